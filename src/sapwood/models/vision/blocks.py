"""Layers that towers have in common: attention among the patches of each picture, and around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import EqualTexts
from sapwood.layers.build import Build
from sapwood.layers.mlp import GatedMLP, PlainMLP
from sapwood.layers.named_linear import NamedLinear, linear
from sapwood.layers.norm import LayerNorm, RMSNorm
from sapwood.layers.targets import Target, once_filled, prefixed, whole
from sapwood.models.vision.grids import rotated

PatchNorm = LayerNorm | RMSNorm
Rotation = Callable[[Tensor, Tensor], Tensor]
"""From x [T, heads, D] and a table of its rows to the rotated x."""


MLP_ROWS = 1024
"""Patches that a layer's MLP takes at a time. What is between its products is several times as
wide as a state: for all patches of some pictures it would be tens of megabytes, which the C library
takes from the system and gives back each time, at a page fault per 4 KiB."""


class PatchAttention:
    """out(attention(rotation(norm(qkv(x))))), among the patches of each picture."""

    def __init__(
        self,
        build: Build,
        size: int,
        num_heads: int,
        *,
        names: Sequence[str] = ("q_proj", "k_proj", "v_proj", "out_proj"),
        bias: bool = True,
        key_bias: bool = True,
        out_bias: bool | None = None,
        num_kv_heads: int | None = None,
        norms: Sequence[tuple[str, PatchNorm]] = (),
        norm_size: int | None = None,
        rotation: Rotation = rotated,
    ) -> None:
        """names         of the projections to queries, keys and values, then to the output; or of
                         one to all three, then to the output
        bias, out_bias   of these; None: the output has as the others have
        key_bias         whether that to keys has one if the others do
        num_kv_heads     None: as many as of queries
        norms            of queries and of keys, by name
        norm_size        over how many entries each is computed; None: over those of each head
        """
        self.kernels = build.kernels
        self._head_dim = size // num_heads
        kv_heads = num_kv_heads or num_heads
        self._heads = (num_heads, kv_heads, kv_heads)
        sizes = [heads * self._head_dim for heads in self._heads]
        *inputs, output = names
        outputs = dict(zip(inputs, sizes, strict=True)) if len(inputs) > 1 else None
        self._sizes = sizes
        self._qkv = NamedLinear(
            build,
            size,
            outputs or {inputs[0]: sum(sizes)},
            bias=bias,
            without_bias=() if key_bias else (inputs[1],),
        )
        self._out = linear(
            build, output, sizes[0], size, bias=bias if out_bias is None else out_bias
        )
        self._norms = tuple(norms)
        self._norm_size = norm_size or self._head_dim
        self._rotation = rotation

    def __call__(
        self, x: Tensor, pictures: Sequence[EqualTexts], table: Tensor | None = None
    ) -> Tensor:
        """x [T, size] -> the same shape; table: what the rotation reads, None: none is done"""
        parts = torch.split(self._qkv(x), self._sizes, dim=-1)
        q, k, v = (
            part.reshape(len(x), heads, self._head_dim)
            for part, heads in zip(parts, self._heads, strict=True)
        )
        if self._norms:
            q, k = (
                norm(one.reshape(-1, self._norm_size)).view_as(one)
                for (_, norm), one in zip(self._norms, (q, k), strict=True)
            )
        if table is not None:
            q, k = self._rotation(q, table), self._rotation(k, table)
        if self._heads[1] != self._heads[0]:
            times = self._heads[0] // self._heads[1]
            k, v = (one.repeat_interleave(times, dim=1) for one in (k, v))
        scale = self._head_dim**-0.5
        mixed = self.kernels.bidirectional_attention(q, k, v, pictures, scale)
        return self._out(mixed.flatten(1))

    def targets(self) -> dict[str, Target]:
        found = self._qkv.targets() | self._out.targets()
        for name, norm in self._norms:
            found |= prefixed(name, norm.targets())
        return found


class Part(Protocol):
    """What has weights of its own."""

    def targets(self) -> dict[str, Target]: ...


class Block:
    """x + attention(norm(x)), then y + mlp(norm(y))."""

    def __init__(
        self,
        *,
        norms: tuple[PatchNorm, PatchNorm],
        attention: PatchAttention,
        mlp: PlainMLP | GatedMLP,
        names: tuple[str, str, str, str],
        scales: Sequence[tuple[str, Tensor]] = (),
    ) -> None:
        """names  in the checkpoint, of the first norm, the attention, the second norm, the mlp
        scales  learned factors [size] of what is added, by name; empty: there are none
        """
        self._norms = norms
        self._attention = attention
        self._mlp = mlp
        self._names = names
        self._scales = tuple(scales)

    def __call__(
        self, x: Tensor, pictures: Sequence[EqualTexts], table: Tensor | None = None
    ) -> Tensor:
        added = self._attention(self._norms[0](x), pictures, table)
        x = self._added(0, x, added)
        parts = [self._mlp(part) for part in torch.split(self._norms[1](x), MLP_ROWS)]
        return self._added(1, x, parts[0] if len(parts) == 1 else torch.cat(parts))

    def _added(self, index: int, x: Tensor, added: Tensor) -> Tensor:
        """x + added, in the memory of what is added."""
        if self._scales:
            added.mul_(self._scales[index][1])
        self._attention.kernels.add_to(x.contiguous(), added)
        return added

    def targets(self) -> dict[str, Target]:
        first, attention, second, mlp = self._names
        return {
            **{name: whole(tensor) for name, tensor in self._scales},
            **prefixed(first, self._norms[0].targets()),
            **prefixed(attention, self._attention.targets()),
            **prefixed(second, self._norms[1].targets()),
            **prefixed(mlp, once_filled(self._mlp.targets(), self._mlp.pack)),
        }


def numbered(name: str, parts: Sequence[Part]) -> dict[str, Target]:
    """The weights of parts in a row, named by their index."""
    found: dict[str, Target] = {}
    for index, part in enumerate(parts):
        found |= prefixed(f"{name}.{index}", part.targets())
    return found


class Projector:
    """second(activation(first(norm(x)))): from a tower's states to the decoder's vectors."""

    def __init__(
        self,
        build: Build,
        sizes: tuple[int, int, int],
        *,
        activation: Activation = Activation.GELU,
        bias: bool = True,
        norm: tuple[str, PatchNorm] | None = None,
        names: tuple[str, str] = ("linear_1", "linear_2"),
        gates: bool = False,
    ) -> None:
        """sizes  of a state, between the layers, of a vector
        norm   by its name; None: there is none
        gates  whether the second half of what lies between is the first half's gate
        """
        size, inner, out = sizes
        self._norm = norm
        self._first = linear(build, names[0], size, inner, bias=bias)
        self._second = linear(build, names[1], inner // 2 if gates else inner, out, bias=bias)
        self._activation = activation
        self._gates = gates
        self._kernels = build.kernels

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, size] -> [T, vector]"""
        if self._norm is not None:
            x = self._norm[1](x)
        x = self._first(x)
        if self._gates:
            value, gate = x.chunk(2, dim=-1)
            x = self._kernels.activate(gate.contiguous(), self._activation) * value
        else:
            x = self._kernels.activate(x, self._activation)
        return self._second(x)

    def targets(self) -> dict[str, Target]:
        found = self._first.targets() | self._second.targets()
        return (
            found
            if self._norm is None
            else found | prefixed(self._norm[0], self._norm[1].targets())
        )
