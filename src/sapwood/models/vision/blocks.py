"""Layers that towers have in common: attention among the patches of each picture."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sapwood.kernels.texts import EqualTexts
from sapwood.layers.build import Build
from sapwood.layers.named_linear import NamedLinear, linear
from sapwood.layers.targets import Target
from sapwood.models.vision.grids import rotated


class FusedAttention:
    """out(attention(rope(qkv(x)))), where one tensor has queries, keys and values."""

    def __init__(
        self, build: Build, size: int, num_heads: int, *, names: tuple[str, str], bias: bool = True
    ) -> None:
        """names: of the projections to queries, keys and values, and to the output"""
        self._kernels = build.kernels
        self._num_heads = num_heads
        self._head_dim = size // num_heads
        self._qkv = linear(build, names[0], size, 3 * size, bias=bias)
        self._out = linear(build, names[1], size, size, bias=bias)

    def __call__(self, x: Tensor, pictures: Sequence[EqualTexts], cos_sin: Tensor | None) -> Tensor:
        """x [T, size] -> the same shape; cos_sin as in grids.rotated, None: nothing is rotated"""
        q, k, v = self._qkv(x).view(len(x), 3, self._num_heads, self._head_dim).unbind(1)
        if cos_sin is not None:
            q, k = rotated(q, cos_sin), rotated(k, cos_sin)
        scale = self._head_dim**-0.5
        mixed = self._kernels.bidirectional_attention(q, k, v, pictures, scale)
        return self._out(mixed.flatten(1))

    def targets(self) -> dict[str, Target]:
        return self._qkv.targets() | self._out.targets()


class SeparateAttention:
    """The same with a tensor for each projection, and without rotation."""

    def __init__(
        self,
        build: Build,
        size: int,
        num_heads: int,
        *,
        names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "out_proj"),
        bias: bool = True,
        key_bias: bool = True,
    ) -> None:
        """names: of the projections to queries, keys, values and to the output; key_bias: whether
        that to keys has a bias if the others do"""
        self._kernels = build.kernels
        self._num_heads = num_heads
        self._head_dim = size // num_heads
        lacking = () if key_bias else (names[1],)
        qkv = dict.fromkeys(names[:3], size)
        self._qkv = NamedLinear(build, size, qkv, bias=bias, without_bias=lacking)
        self._out = linear(build, names[3], size, size, bias=bias)

    def __call__(
        self, x: Tensor, pictures: Sequence[EqualTexts], cos_sin: Tensor | None = None
    ) -> Tensor:
        """x [T, size] -> the same shape; cos_sin as in grids.rotated, None: nothing is rotated"""
        q, k, v = self._qkv(x).view(len(x), 3, self._num_heads, self._head_dim).unbind(1)
        if cos_sin is not None:
            q, k = rotated(q, cos_sin), rotated(k, cos_sin)
        scale = self._head_dim**-0.5
        mixed = self._kernels.bidirectional_attention(q, k, v, pictures, scale)
        return self._out(mixed.flatten(1))

    def targets(self) -> dict[str, Target]:
        return self._qkv.targets() | self._out.targets()
