"""The block that transformers of two streams share: text and picture have weights of their own,
and attend to each other. Source: Esser et al. 2024, arXiv:2403.03206 (MMDiT)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import EqualTexts, group_texts
from sapwood.layers.adaptive import add_gated, modulated_norm
from sapwood.layers.build import Build
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.named_linear import NamedLinear, linear
from sapwood.layers.norm import RMSNorm
from sapwood.layers.targets import Target, once_filled, prefixed
from sapwood.layers.token_rows import JointRows, TokenRows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JointStep:
    """What all blocks of a step are given.

    rows       of text and picture
    groups     rows of equal length, for attention
    rotations  [T, head_dim / 2] complex64, in the order of the joint tokens; None: nothing rotates
    """

    rows: JointRows
    groups: list[EqualTexts]
    rotations: Tensor | None

    @staticmethod
    def of(rows: JointRows, rotations: Tensor | None, device: torch.device) -> JointStep:
        groups = group_texts(rows.joint.lengths, device)
        return JointStep(rows=rows, groups=groups, rotations=rotations)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSizes:
    """num_heads heads of head_dim entries, whose queries and keys have norms with eps; None: they
    have none."""

    num_heads: int
    head_dim: int
    norm_eps: float | None = 1e-6

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


@dataclass(frozen=True, slots=True, eq=False)
class JointHeads:
    """Queries, keys and values [T, H, D] of the joint tokens."""

    q: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def empty(like: Tensor, num_tokens: int, heads: HeadSizes) -> JointHeads:
        shape = (num_tokens, heads.num_heads, heads.head_dim)
        return JointHeads(like.new_empty(shape), like.new_empty(shape), like.new_empty(shape))


class Projections:
    """Queries, keys and values of one stream, and perhaps more outputs of the same product."""

    def __init__(
        self,
        build: Build,
        in_size: int,
        heads: HeadSizes,
        *,
        names: tuple[str, str, str],
        norms: tuple[str, str],
        bias: bool = True,
        beside: Mapping[str, int] | None = None,
    ) -> None:
        """names: of the layers; norms: of the norms; beside: further layers and their outputs"""
        self._heads = heads
        self._kernels = build.kernels
        self._norm_names = norms
        sizes = dict.fromkeys(names, heads.width) | dict(beside or {})
        self._linear = NamedLinear(build, in_size, sizes, bias=bias)
        self._norms: tuple[RMSNorm, ...] = ()
        if heads.norm_eps is not None:
            self._norms = tuple(
                RMSNorm(build, heads.head_dim, eps=heads.norm_eps) for _ in range(2)
            )

    def __call__(
        self, x: Tensor, rotations: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """x [T, in] -> queries, keys and values [T, H, D], and what is beside them"""
        q, k, v, *beside = self._linear.split(x)
        shape = (len(x), self._heads.num_heads, self._heads.head_dim)
        turned = (x.new_empty(shape), x.new_empty(shape))
        self._rotate((q, k), turned, rotations)
        return *turned, v.reshape(shape), tuple(beside)

    def place(
        self, x: Tensor, spans: Iterable[tuple[slice, slice]], to: JointHeads, step: JointStep
    ) -> None:
        """x [T, in]: write the queries, keys and values of tokens `own` to the joint tokens
        `there`, for each (own, there) of `spans`."""
        q, k, v = self._linear.split(x)
        for own, there in spans:
            rotations = None if step.rotations is None else step.rotations[there]
            self._rotate((q[own], k[own]), (to.q[there], to.k[there]), rotations)
            to.v[there].view(-1, self._heads.width).copy_(v[own])

    def _rotate(
        self, heads: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor], rotations: Tensor | None
    ) -> None:
        for x, to, norm in zip(heads, out, self._norms or (None, None), strict=True):
            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            self._kernels.norm_rotate_heads(x, weight, eps, rotations, to)

    def targets(self) -> dict[str, Target]:
        found = self._linear.targets()
        for name, norm in zip(self._norm_names, self._norms, strict=False):
            found |= prefixed(name, norm.targets())
        return found


class JointAttention:
    """Attention of all tokens of a row to each other, whose two streams are projected apart."""

    def __init__(
        self,
        build: Build,
        size: int,
        heads: HeadSizes,
        *,
        text_out: bool = True,
        bias: bool = True,
    ) -> None:
        """text_out: whether the text goes on after it; bias: of all its layers"""
        self._kernels = build.kernels
        self._heads = heads
        self._scale = heads.head_dim**-0.5
        self._picture = Projections(
            build,
            size,
            heads,
            names=("to_q", "to_k", "to_v"),
            norms=("norm_q", "norm_k"),
            bias=bias,
        )
        self._text = Projections(
            build,
            size,
            heads,
            names=("add_q_proj", "add_k_proj", "add_v_proj"),
            norms=("norm_added_q", "norm_added_k"),
            bias=bias,
        )
        self._out = linear(build, "to_out.0", heads.width, size, bias=bias)
        self._text_out = None
        if text_out:
            self._text_out = linear(build, "to_add_out", heads.width, size, bias=bias)

    def __call__(self, text: Tensor, picture: Tensor, step: JointStep) -> tuple[Tensor, Tensor]:
        """text [T1, size], picture [T2, size] -> the same shapes; without an output for the text,
        [T1, width] as it was attended"""
        heads = JointHeads.empty(picture, len(text) + len(picture), self._heads)
        of_text, of_picture = step.rows.places
        self._text.place(text, of_text, heads, step)
        self._picture.place(picture, of_picture, heads, step)
        mixed = self._kernels.bidirectional_attention(
            heads.q, heads.k, heads.v, step.groups, self._scale
        )
        text, picture = step.rows.part(mixed.flatten(1))
        return text if self._text_out is None else self._text_out(text), self._out(picture)

    def targets(self) -> dict[str, Target]:
        found = self._picture.targets() | self._text.targets() | self._out.targets()
        return found if self._text_out is None else found | self._text_out.targets()


class GeluMLP:
    """A plain feed-forward layer under diffusers' names of its parts."""

    def __init__(self, build: Build, size: int, *, ratio: float = 4.0) -> None:
        self._mlp = PlainMLP(
            build,
            size,
            int(size * ratio),
            activation=Activation.GELU_TANH,
            bias=True,
            names=("net.0.proj", "net.2"),
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self._mlp(x)

    def targets(self) -> dict[str, Target]:
        return once_filled(self._mlp.targets(), self._mlp.pack)


def feed_forward(
    build: Build,
    mlp: GeluMLP,
    x: Tensor,
    rows: TokenRows,
    numbers: tuple[Tensor, ...],
    *,
    eps: float = 1e-6,
) -> None:
    """x += gate * mlp(norm(x)). x [T, size]; numbers: shift, scale and gate [R, size]"""
    shift, scale, gate = numbers
    normed = modulated_norm(build.kernels, x, rows, shift=shift, scale=scale, eps=eps)
    add_gated(x, gate, mlp(normed), rows)


def whole_number(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A field of a component's config.json; ConfigError if it is missing or no positive number."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"the component's {name} must be a whole number >= 1, got {value!r}")
    return value
