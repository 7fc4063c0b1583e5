"""AutoencoderKL, of Stable Diffusion 1.5, XL and 3, Flux and Z-Image. Source: Rombach et al. 2021,
arXiv:2112.10752."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.layers.build import Build
from sapwood.layers.convolution import Conv2d, GroupNorm
from sapwood.layers.masked_attention import attend
from sapwood.layers.named_linear import NamedLinear, linear
from sapwood.layers.residual_convolution import Downsample, ResidualBlock, Upsample
from sapwood.layers.targets import Target, prefixed, whole
from sapwood.models.vae.tiles import Tiling, compute_tiled

EPS = 1e-6


class PictureAttention:
    """x + attention of all pixels to each other, with one head."""

    def __init__(self, build: Build, channels: int, num_groups: int) -> None:
        self._channels = channels
        self._norm = GroupNorm(build, num_groups, channels, eps=EPS)
        names = dict.fromkeys(("to_q", "to_k", "to_v"), channels)
        self._qkv = NamedLinear(build, channels, names)
        self._out = linear(build, "to_out.0", channels, channels)

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, channels, H, W] -> the same shape"""
        batch, channels, height, width = x.shape
        pixels = self._norm(x).flatten(2).transpose(1, 2).reshape(-1, channels)
        q, k, v = self._qkv(pixels).view(batch, height * width, 3, 1, channels).unbind(2)
        mixed = self._out(attend(q, k, v, scale=channels**-0.5).flatten(0, 1))
        return x + mixed.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def targets(self) -> dict[str, Target]:
        norm = prefixed("group_norm", self._norm.targets())
        return norm | self._qkv.targets() | self._out.targets()


class MiddleBlock:
    """A residual block, perhaps attention, and a residual block."""

    def __init__(self, build: Build, channels: int, num_groups: int, *, attends: bool) -> None:
        self._blocks = [
            ResidualBlock(build, channels, channels, num_groups=num_groups) for _ in range(2)
        ]
        self._attention = PictureAttention(build, channels, num_groups) if attends else None

    def __call__(self, x: Tensor) -> Tensor:
        x = self._blocks[0](x)
        if self._attention is not None:
            x = self._attention(x)
        return self._blocks[1](x)

    def targets(self) -> dict[str, Target]:
        found = prefixed("resnets.0", self._blocks[0].targets())
        found |= prefixed("resnets.1", self._blocks[1].targets())
        if self._attention is not None:
            found |= prefixed("attentions.0", self._attention.targets())
        return found


class _Half:
    """The encoder, or the decoder: their parts by name, in the order of the computation."""

    def __init__(
        self,
        build: Build,
        parts: Sequence[tuple[str, ResidualBlock | Downsample | Upsample | MiddleBlock]],
        *,
        ends: tuple[Conv2d, GroupNorm, Conv2d],
    ) -> None:
        """ends: the first convolution, the last norm and the last convolution"""
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
        found |= prefixed("conv_norm_out", self._norm.targets())
        return found | prefixed("conv_out", self._last.targets())


class AutoencoderKL:
    """Pictures in -1..1 to latents that a diffusion model is given, and back.

    scale  pixels per latent, in height and in width
    tiles  whether large pictures are computed tile by tile, which changes them a little
    """

    def __init__(self, config: Mapping[str, Any], build: Build) -> None:
        """config: config.json of the component"""
        _refuse_what_is_not_implemented(config)
        self._build = build
        channels = list(config.get("block_out_channels", (64,)))
        latents = self.latent_channels = int(config.get("latent_channels", 4))
        groups = int(config.get("norm_num_groups", 32))
        depth = int(config.get("layers_per_block", 1))
        attends = bool(config.get("mid_block_add_attention", True))
        self.scale = 2 ** (len(channels) - 1)
        self.scaling_factor = float(config.get("scaling_factor", 0.18215))
        self.shift_factor = float(config.get("shift_factor") or 0.0)
        self.dtype, self.device = build.dtype, build.device
        self.tiles = False
        size = config.get("sample_size", 32)
        self.tile_size = int(size[0] if isinstance(size, (list, tuple)) else size)
        ends = (
            Conv2d(build, int(config.get("in_channels", 3)), channels[0]),
            GroupNorm(build, groups, channels[-1], eps=EPS),
            Conv2d(build, channels[-1], 2 * latents),
        )
        down = _down_parts(build, channels, depth, groups, attends=attends)
        self._encoder = _Half(build, down, ends=ends)
        ends = (
            Conv2d(build, latents, channels[-1]),
            GroupNorm(build, groups, channels[0], eps=EPS),
            Conv2d(build, channels[0], int(config.get("out_channels", 3))),
        )
        up = _up_parts(build, channels, depth, groups, attends=attends)
        self._decoder = _Half(build, up, ends=ends)
        self._before: Conv2d | None = None
        self._after: Conv2d | None = None
        if config.get("use_quant_conv", True):
            self._after = Conv2d(build, 2 * latents, 2 * latents, 1)
        if config.get("use_post_quant_conv", True):
            self._before = Conv2d(build, latents, latents, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, channels, h, w], as a diffusion model has them -> pictures [B, 3, H, W]"""
        return self._decoded(self._from_model(latents))

    def decode_tiled(self, latents: Tensor) -> Generator[None, None, Tensor]:
        """The same; of large pictures tile by tile where `tiles` is set, yielding after each."""
        tiling = Tiling.of(self.tile_size // self.scale, self.tile_size)
        own = self._from_model(latents)
        if not self.tiles or not tiling.is_needed(own):
            return self._decoded(own)
        return (yield from compute_tiled(own, self._decoded, tiling))

    def encode(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """pictures [B, 3, H, W] in -1..1 -> latents [B, channels, h, w] as a diffusion model has
        them: drawn with the generator, or without one the most probable ones"""
        return self._drawn(self._encoded(pictures.to(self.dtype)), generator)

    def encode_tiled(
        self, pictures: Tensor, generator: torch.Generator | None = None
    ) -> Generator[None, None, Tensor]:
        """The same, as decode_tiled."""
        tiling = Tiling.of(self.tile_size, self.tile_size // self.scale)
        if not self.tiles or not tiling.is_needed(pictures):
            return self.encode(pictures, generator)
        moments = yield from compute_tiled(pictures.to(self.dtype), self._encoded, tiling)
        return self._drawn(moments, generator)

    def _from_model(self, latents: Tensor) -> Tensor:
        return (latents / self.scaling_factor + self.shift_factor).to(self.dtype)

    def _decoded(self, latents: Tensor) -> Tensor:
        return self._decoder(latents if self._before is None else self._before(latents))

    def _encoded(self, pictures: Tensor) -> Tensor:
        """[B, 2 * channels, h, w]: mean and logarithm of the variance"""
        moments = self._encoder(pictures)
        return moments if self._after is None else self._after(moments)

    def _drawn(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
            deviation = (0.5 * log_variance.clamp(-30.0, 20.0)).exp()
            mean = mean + deviation * noise.to(mean.device)
        return (mean - self.shift_factor) * self.scaling_factor

    def targets(self) -> dict[str, Target]:
        found = prefixed("encoder", self._encoder.targets())
        found |= prefixed("decoder", self._decoder.targets())
        if self._after is not None:
            found |= prefixed("quant_conv", self._after.targets())
        if self._before is not None:
            found |= prefixed("post_quant_conv", self._before.targets())
        return found

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()

    @staticmethod
    def checkpoint_name(name: str) -> str:
        """The name in `targets()`; the first checkpoints have other names of attention's layers."""
        for old, new in _FIRST_NAMES.items():
            name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
        return name


class AutoencoderKLFlux2(AutoencoderKL):
    """Flux.2's: four neighbouring latents are a token, whose entries have means and deviations."""

    def __init__(self, config: Mapping[str, Any], build: Build) -> None:
        other = config.get("decoder_block_out_channels")
        if other and list(other) != list(config.get("block_out_channels", (64,))):
            raise ConfigError("decoder_block_out_channels of its own is not implemented")
        super().__init__({**config, "scaling_factor": 1.0, "shift_factor": 0.0}, build)
        size = 4 * self.latent_channels
        self._means, self._variances = build.empty(size), build.empty(size)
        self._eps = float(config.get("batch_norm_eps", 1e-4))

    def tokens_to_decode(self, tokens: Tensor) -> Tensor:
        """tokens [S, 4 * channels], as a diffusion model has them -> as the decoder's latents"""
        return tokens * (self._variances + self._eps).sqrt() + self._means

    def targets(self) -> dict[str, Target]:
        return super().targets() | {
            "bn.running_mean": whole(self._means),
            "bn.running_var": whole(self._variances),
        }

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ("bn.num_batches_tracked",)


_FIRST_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _down_parts(
    build: Build, channels: Sequence[int], depth: int, groups: int, *, attends: bool
) -> list[tuple[str, ResidualBlock | Downsample | Upsample | MiddleBlock]]:
    parts: list[tuple[str, ResidualBlock | Downsample | Upsample | MiddleBlock]] = []
    before = channels[0]
    for index, width in enumerate(channels):
        for layer in range(depth):
            block = ResidualBlock(build, before, width, num_groups=groups)
            parts.append((f"down_blocks.{index}.resnets.{layer}", block))
            before = width
        if index < len(channels) - 1:
            smaller = Downsample(build, width, pads_all_sides=False)
            parts.append((f"down_blocks.{index}.downsamplers.0", smaller))
    parts.append(("mid_block", MiddleBlock(build, channels[-1], groups, attends=attends)))
    return parts


def _up_parts(
    build: Build, channels: Sequence[int], depth: int, groups: int, *, attends: bool
) -> list[tuple[str, ResidualBlock | Downsample | Upsample | MiddleBlock]]:
    middle = MiddleBlock(build, channels[-1], groups, attends=attends)
    parts: list[tuple[str, ResidualBlock | Downsample | Upsample | MiddleBlock]] = [
        ("mid_block", middle)
    ]
    before = channels[-1]
    for index, width in enumerate(reversed(channels)):
        for layer in range(depth + 1):
            block = ResidualBlock(build, before, width, num_groups=groups)
            parts.append((f"up_blocks.{index}.resnets.{layer}", block))
            before = width
        if index < len(channels) - 1:
            parts.append((f"up_blocks.{index}.upsamplers.0", Upsample(build, width)))
    return parts


def _refuse_what_is_not_implemented(config: Mapping[str, Any]) -> None:
    for name, known in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        others = sorted(set(config.get(name, (known,))) - {known})
        if others:
            raise ConfigError(f"the autoencoder has {others} among its {name}; known: {known}")
    if config.get("act_fn", "silu") != "silu":
        raise ConfigError(f"the autoencoder's act_fn must be 'silu', got {config['act_fn']!r}")
