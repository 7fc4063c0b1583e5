"""The block that transformers of two streams share: text and picture have weights of their own,
and attend to each other. Source: Esser et al. 2024, arXiv:2403.03206 (MMDiT)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import EqualTexts, group_texts
from sapwood.layers.adaptive import add_gated, modulated_norm
from sapwood.layers.axial_rope import rotate
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
        self._norm_names = norms
        sizes = dict.fromkeys(names, heads.width) | dict(beside or {})
        self._linear = NamedLinear(build, in_size, sizes, bias=bias)
        self._norms: tuple[RMSNorm, ...] = ()
        if heads.norm_eps is not None:
            self._norms = tuple(
                RMSNorm(build, heads.head_dim, eps=heads.norm_eps) for _ in range(2)
            )

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """x [T, in] -> queries, keys and values [T, H, D], and what is beside them"""
        q, k, v, *beside = self._linear.split(x)
        shape = (len(x), self._heads.num_heads, self._heads.head_dim)
        if self._norms:
            q, k = (
                norm(part.reshape(-1, self._heads.head_dim))
                for norm, part in zip(self._norms, (q, k), strict=True)
            )
        return q.reshape(shape), k.reshape(shape), v.reshape(shape), tuple(beside)

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
        of_text, of_picture = self._text(text), self._picture(picture)
        q, k, v = (step.rows.join(a, b) for a, b in zip(of_text[:3], of_picture[:3], strict=True))
        if step.rotations is not None:
            q, k = rotate(q, step.rotations), rotate(k, step.rotations)
        mixed = self._kernels.bidirectional_attention(q, k, v, step.groups, self._scale)
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
