"""Attention in a U-Net: pixels to each other, then to the prompt."""

from __future__ import annotations

from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.layers.build import Build
from sapwood.layers.convolution import GroupNorm
from sapwood.layers.masked_attention import attend
from sapwood.layers.named_linear import NamedLinear, linear
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, prefixed

GROUP_EPS, LAYER_EPS = 1e-6, 1e-5


class PointwiseLinear:
    """A linear layer of every pixel; some checkpoints have it as a convolution [out, in, 1, 1]."""

    def __init__(self, build: Build, name: str, size: int, *, is_convolution: bool) -> None:
        self._name, self._is_convolution = name, is_convolution
        self._layer = linear(build, name, size, size)

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer(x)

    def targets(self) -> dict[str, Target]:
        found = self._layer.targets()
        if not self._is_convolution:
            return found
        name = f"{self._name}.weight"
        weight = found[name]

        def put(kernel: Tensor) -> None:
            weight.put(kernel.flatten(1))

        shape = (*weight.shape, 1, 1)
        return found | {name: Target(shape, put, adapter=weight.adapter)}


class CrossAttention:
    """x + attention(norm(x)), to the pixels themselves or to a prompt."""

    def __init__(self, build: Build, size: int, num_heads: int, text_size: int | None) -> None:
        """text_size: of the prompt's vectors; None: pixels attend to pixels"""
        self._num_heads, self._head_dim = num_heads, size // num_heads
        self._query = None
        names = ("to_q", "to_k", "to_v") if text_size is None else ("to_k", "to_v")
        if text_size is not None:
            self._query = linear(build, "to_q", size, size, bias=False)
        self._others = NamedLinear(build, text_size or size, dict.fromkeys(names, size), bias=False)
        self._out = linear(build, "to_out.0", size, size)

    def __call__(self, x: Tensor, text: Tensor | None, batch: int) -> Tensor:
        """x [B * S, size]; text [B * L, text size], or None -> [B * S, size]"""
        if self._query is None or text is None:
            q, k, v = self._heads(self._others(x), batch, 3)
        else:
            (q,) = self._heads(self._query(x), batch, 1)
            k, v = self._heads(self._others(text), batch, 2)
        mixed = attend(q, k, v, scale=self._head_dim**-0.5)
        return self._out(mixed.flatten(0, 1))

    def _heads(self, x: Tensor, batch: int, count: int) -> tuple[Tensor, ...]:
        return x.view(batch, -1, count, self._num_heads, self._head_dim).unbind(2)

    def targets(self) -> dict[str, Target]:
        found = self._others.targets() | self._out.targets()
        return found if self._query is None else found | self._query.targets()


class TransformerBlock:
    """Attention to pixels, attention to the prompt, and a gated feed-forward layer."""

    def __init__(self, build: Build, size: int, num_heads: int, text_size: int) -> None:
        self._kernels = build.kernels
        self._norms = [LayerNorm(build, size, eps=LAYER_EPS) for _ in range(3)]
        self._own = CrossAttention(build, size, num_heads, None)
        self._cross = CrossAttention(build, size, num_heads, text_size)
        # The gate is the second half of its outputs.
        self._up = linear(build, "ff.net.0.proj", size, 8 * size)
        self._down = linear(build, "ff.net.2", 4 * size, size)

    def __call__(self, x: Tensor, text: Tensor, batch: int) -> Tensor:
        """x [B * S, size]; text [B * L, text size]"""
        x = x + self._own(self._norms[0](x), None, batch)
        x = x + self._cross(self._norms[1](x), text, batch)
        up, gate = self._up(self._norms[2](x)).chunk(2, dim=-1)
        return x + self._down(self._kernels.activate(gate.contiguous(), Activation.GELU).mul_(up))

    def targets(self) -> dict[str, Target]:
        found = prefixed("attn1", self._own.targets()) | prefixed("attn2", self._cross.targets())
        for index, norm in enumerate(self._norms, start=1):
            found |= prefixed(f"norm{index}", norm.targets())
        return found | self._up.targets() | self._down.targets()


class PictureTransformer:
    """x + blocks(norm(x)), over all pixels of a picture."""

    def __init__(
        self,
        build: Build,
        channels: int,
        *,
        num_heads: int,
        depth: int,
        text_size: int,
        num_groups: int,
        is_linear: bool,
    ) -> None:
        """is_linear: whether the checkpoint's first and last layer are linear ones"""
        self._norm = GroupNorm(build, num_groups, channels, eps=GROUP_EPS)
        self._in, self._out = (
            PointwiseLinear(build, name, channels, is_convolution=not is_linear)
            for name in ("proj_in", "proj_out")
        )
        self._blocks = [
            TransformerBlock(build, channels, num_heads, text_size) for _ in range(depth)
        ]

    def __call__(self, x: Tensor, text: Tensor) -> Tensor:
        """x [B, channels, H, W]; text [B, L, text size] -> x's shape"""
        batch, channels, height, width = x.shape
        pixels = self._norm(x).flatten(2).transpose(1, 2).reshape(-1, channels)
        pixels = self._in(pixels)
        for block in self._blocks:
            pixels = block(pixels, text.flatten(0, 1), batch)
        pixels = self._out(pixels).view(batch, height, width, channels)
        return x + pixels.permute(0, 3, 1, 2)

    def targets(self) -> dict[str, Target]:
        found = prefixed("norm", self._norm.targets()) | self._in.targets() | self._out.targets()
        for index, block in enumerate(self._blocks):
            found |= prefixed(f"transformer_blocks.{index}", block.targets())
        return found
