"""AutoencoderKLQwenImage, for single pictures. Source: Wu et al. 2025, arXiv:2508.02324; Wan Team
2025, arXiv:2503.20314.

The checkpoint's convolutions are over frames too, and look at earlier frames. A single picture has
none before it, so that only the last of their slices in time ever meets a pixel: these alone are
kept, as convolutions over a picture, and the layers between frames are left out."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.layers.build import Build
from sapwood.layers.convolution import convolve, kernel_of
from sapwood.layers.masked_attention import attend
from sapwood.layers.residual_convolution import Downsample
from sapwood.layers.targets import Target, prefixed, whole
from sapwood.models.vae.tiles import Tiling, compute_tiled

_TILE = 256


class LastSlice:
    """A convolution over pictures: the last slice in time of one over frames."""

    def __init__(self, build: Build, in_channels: int, out_channels: int, kernel: int) -> None:
        self._weight = kernel_of(build, out_channels, in_channels, kernel)
        self._bias = build.empty(out_channels)
        self._kernel = kernel

    def __call__(self, x: Tensor) -> Tensor:
        return convolve(x, self._weight, self._bias, padding=self._kernel // 2)

    def targets(self) -> dict[str, Target]:
        def put(weight: Tensor) -> None:
            self._weight.copy_(weight[:, :, -1])

        out_channels, in_channels = self._weight.shape[:2]
        shape = (out_channels, in_channels, self._kernel, self._kernel, self._kernel)
        return {"weight": Target(shape, put), "bias": whole(self._bias)}


class PlainConv:
    """A convolution over pictures."""

    def __init__(self, build: Build, in_channels: int, out_channels: int, kernel: int) -> None:
        self._weight = kernel_of(build, out_channels, in_channels, kernel)
        self._bias = build.empty(out_channels)
        self._padding = kernel // 2

    def __call__(self, x: Tensor) -> Tensor:
        return convolve(x, self._weight, self._bias, padding=self._padding)

    def targets(self) -> dict[str, Target]:
        return {"weight": whole(self._weight), "bias": whole(self._bias)}


class ChannelNorm:
    """x / rms(x) * weight over the channels of each pixel."""

    def __init__(self, build: Build, channels: int, *, axes: int) -> None:
        """axes: of size 1, after the channels of the checkpoint's tensor"""
        self._gamma = build.empty(channels)
        self._axes = axes

    def __call__(self, x: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(x.float(), dim=1, keepdim=True).clamp(min=1e-12)
        scale = math.sqrt(x.shape[1])
        normed: Tensor = (x.float() / lengths).to(x.dtype)
        return normed * scale * self._gamma[:, None, None]

    def silu(self, x: Tensor) -> Tensor:
        """silu(norm(x))"""
        return F.silu(self(x), inplace=True)

    def targets(self) -> dict[str, Target]:
        shape = (len(self._gamma), *(1,) * self._axes)

        def put(gamma: Tensor) -> None:
            self._gamma.copy_(gamma.flatten())

        return {"gamma": Target(shape, put)}


class FrameBlock:
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, build: Build, in_channels: int, out_channels: int) -> None:
        self._norm1 = ChannelNorm(build, in_channels, axes=3)
        self._conv1 = LastSlice(build, in_channels, out_channels, 3)
        self._norm2 = ChannelNorm(build, out_channels, axes=3)
        self._conv2 = LastSlice(build, out_channels, out_channels, 3)
        self._shortcut = None
        if in_channels != out_channels:
            self._shortcut = LastSlice(build, in_channels, out_channels, 1)

    def __call__(self, x: Tensor) -> Tensor:
        inner = self._conv2(self._norm2.silu(self._conv1(self._norm1.silu(x))))
        return inner.add_(x if self._shortcut is None else self._shortcut(x))

    def targets(self) -> dict[str, Target]:
        parts: dict[str, ChannelNorm | LastSlice] = {
            "norm1": self._norm1,
            "conv1": self._conv1,
            "norm2": self._norm2,
            "conv2": self._conv2,
        }
        if self._shortcut is not None:
            parts["conv_shortcut"] = self._shortcut
        return {
            name: target
            for prefix, part in parts.items()
            for name, target in prefixed(prefix, part.targets()).items()
        }


class FrameAttention:
    """x + attention of all pixels to each other, with one head."""

    def __init__(self, build: Build, channels: int) -> None:
        self._norm = ChannelNorm(build, channels, axes=2)
        self._qkv = PlainConv(build, channels, 3 * channels, 1)
        self._out = PlainConv(build, channels, channels, 1)

    def __call__(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self._qkv(self._norm(x)).reshape(batch, 3, 1, channels, height * width)
        q, k, v = qkv.permute(1, 0, 4, 2, 3)
        mixed = attend(q, k, v, scale=channels**-0.5).transpose(1, 2)
        return x + self._out(mixed.reshape(batch, channels, height, width))

    def targets(self) -> dict[str, Target]:
        found = prefixed("norm", self._norm.targets())
        found |= prefixed("to_qkv", self._qkv.targets())
        return found | prefixed("proj", self._out.targets())


class HalvingUpsample:
    """Every pixel becomes four; then a convolution to half as many channels."""

    def __init__(self, build: Build, channels: int) -> None:
        self._conv = PlainConv(build, channels, channels // 2, 3)

    def __call__(self, x: Tensor) -> Tensor:
        return self._conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def targets(self) -> dict[str, Target]:
        return prefixed("resample.1", self._conv.targets())


class FrameDownsample:
    """The autoencoder's Downsample under this checkpoint's name."""

    def __init__(self, build: Build, channels: int) -> None:
        self._down = Downsample(build, channels, pads_all_sides=False)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(x)

    def targets(self) -> dict[str, Target]:
        return {
            name.replace("conv.", "resample.1.", 1): target
            for name, target in self._down.targets().items()
        }


_Part = FrameBlock | FrameAttention | HalvingUpsample | FrameDownsample


class _Half:
    """The encoder, or the decoder: their parts by name, in the order of the computation."""

    def __init__(
        self,
        parts: Sequence[tuple[str, _Part]],
        ends: tuple[LastSlice, ChannelNorm, LastSlice],
    ) -> None:
        self._parts = parts
        self._first, self._norm, self._last = ends

    def __call__(self, x: Tensor) -> Tensor:
        x = self._first(x)
        for _, part in self._parts:
            x = part(x)
        return self._last(self._norm.silu(x))

    def targets(self) -> dict[str, Target]:
        found = prefixed("conv_in", self._first.targets())
        for name, part in self._parts:
            found |= prefixed(name, part.targets())
        found |= prefixed("norm_out", self._norm.targets())
        return found | prefixed("conv_out", self._last.targets())


class AutoencoderKLQwenImage:
    """Pictures in -1..1 to latents that a diffusion model is given, and back.

    scale  pixels per latent, in height and in width
    tiles  whether large pictures are computed tile by tile, which changes them a little
    """

    def __init__(self, config: Mapping[str, Any], build: Build) -> None:
        """config: config.json of the component"""
        if config.get("attn_scales"):
            raise ConfigError("the autoencoder's attn_scales are not implemented")
        latents = self.latent_channels = int(config.get("z_dim", 16))
        widths = [int(config.get("base_dim", 96)) * m for m in config.get("dim_mult", (1, 2, 4, 4))]
        depth = int(config.get("num_res_blocks", 2))
        colours = int(config.get("input_channels", 3))
        self.scale = 2 ** (len(widths) - 1)
        self.dtype, self.device = build.dtype, build.device
        self.tiles = False
        mean, deviation = (
            torch.tensor(config[name], dtype=torch.float32, device=build.device)[:, None, None]
            for name in ("latents_mean", "latents_std")
        )
        self._mean, self._deviation = mean, deviation
        first = int(config.get("base_dim", 96))
        self._encoder = _Half(
            _down_parts(build, first, widths, depth),
            (
                LastSlice(build, colours, first, 3),
                ChannelNorm(build, widths[-1], axes=3),
                LastSlice(build, widths[-1], 2 * latents, 3),
            ),
        )
        self._decoder = _Half(
            _up_parts(build, widths, depth),
            (
                LastSlice(build, latents, widths[-1], 3),
                ChannelNorm(build, widths[0], axes=3),
                LastSlice(build, widths[0], colours, 3),
            ),
        )
        self._after = LastSlice(build, 2 * latents, 2 * latents, 1)
        self._before = LastSlice(build, latents, latents, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, channels, h, w], as a diffusion model has them -> pictures [B, 3, H, W]"""
        return self._decoded(self._from_model(latents)).clamp_(-1.0, 1.0)

    def decode_tiled(self, latents: Tensor) -> Generator[None, None, Tensor]:
        """The same; of large pictures tile by tile where `tiles` is set, yielding after each."""
        tiling = Tiling.of(_TILE // self.scale, _TILE)
        own = self._from_model(latents)
        if not self.tiles or not tiling.is_needed(own):
            return self._decoded(own).clamp_(-1.0, 1.0)
        whole = yield from compute_tiled(own, self._decoded, tiling)
        return whole.clamp_(-1.0, 1.0)

    def encode(self, pictures: Tensor) -> Tensor:
        """pictures [B, 3, H, W] in -1..1 -> the most probable latents [B, channels, h, w]"""
        return self._to_model(self._encoded(pictures.to(self.dtype)))

    def encode_tiled(self, pictures: Tensor) -> Generator[None, None, Tensor]:
        """The same, as decode_tiled."""
        tiling = Tiling.of(_TILE, _TILE // self.scale)
        if not self.tiles or not tiling.is_needed(pictures):
            return self.encode(pictures)
        moments = yield from compute_tiled(pictures.to(self.dtype), self._encoded, tiling)
        return self._to_model(moments)

    def _from_model(self, latents: Tensor) -> Tensor:
        return (latents * self._deviation + self._mean).to(self.dtype)

    def _to_model(self, moments: Tensor) -> Tensor:
        return (moments.chunk(2, dim=1)[0] - self._mean) / self._deviation

    def _decoded(self, latents: Tensor) -> Tensor:
        return self._decoder(self._before(latents))

    def _encoded(self, pictures: Tensor) -> Tensor:
        return self._after(self._encoder(pictures))

    def targets(self) -> dict[str, Target]:
        found = prefixed("encoder", self._encoder.targets())
        found |= prefixed("decoder", self._decoder.targets())
        found |= prefixed("quant_conv", self._after.targets())
        return found | prefixed("post_quant_conv", self._before.targets())

    def ignorable_tensors(self) -> tuple[str, ...]:
        """Layers between frames."""
        return ("*.time_conv.*",)


def _middle(build: Build, channels: int) -> list[tuple[str, _Part]]:
    return [
        ("mid_block.resnets.0", FrameBlock(build, channels, channels)),
        ("mid_block.attentions.0", FrameAttention(build, channels)),
        ("mid_block.resnets.1", FrameBlock(build, channels, channels)),
    ]


def _down_parts(
    build: Build, first: int, widths: Sequence[int], depth: int
) -> list[tuple[str, _Part]]:
    parts: list[_Part] = []
    before = first
    for index, width in enumerate(widths):
        for _ in range(depth):
            parts.append(FrameBlock(build, before, width))
            before = width
        if index < len(widths) - 1:
            parts.append(FrameDownsample(build, width))
    named: list[tuple[str, _Part]] = [
        (f"down_blocks.{index}", part) for index, part in enumerate(parts)
    ]
    return named + _middle(build, widths[-1])


def _up_parts(build: Build, widths: Sequence[int], depth: int) -> list[tuple[str, _Part]]:
    parts = _middle(build, widths[-1])
    before = widths[-1]
    for index, width in enumerate(reversed(widths)):
        for layer in range(depth + 1):
            parts.append((f"up_blocks.{index}.resnets.{layer}", FrameBlock(build, before, width)))
            before = width
        if index < len(widths) - 1:
            parts.append((f"up_blocks.{index}.upsamplers.0", HalvingUpsample(build, width)))
            before = width // 2
    return parts
