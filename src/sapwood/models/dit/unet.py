"""The U-Net of Stable Diffusion 1.5 and XL. Source: Rombach et al. 2021, arXiv:2112.10752;
Podell et al. 2023, arXiv:2307.01952.

Rows whose latents and texts have the same shape are computed together; others one group after the
other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.layers.build import Build
from sapwood.layers.convolution import Conv2d, GroupNorm
from sapwood.layers.residual_convolution import Downsample, ResidualBlock, Upsample
from sapwood.layers.targets import Target, prefixed
from sapwood.layers.timesteps import EmbeddingMLP, sinusoids
from sapwood.models.dit.rows import column
from sapwood.models.dit.unet_attention import PictureTransformer

_ONLY: Mapping[str, Any] = {
    "act_fn": "silu",
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "attention_type": "default",
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "resnet_out_scale_factor": 1.0,
}
_NONE = (
    *("center_input_sample", "only_cross_attention", "dual_cross_attention", "class_embed_type"),
    *("num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type", "time_cond_proj_dim"),
    *("time_embedding_dim", "time_embedding_act_fn", "timestep_post_act", "resnet_skip_time_act"),
    *("class_embeddings_concat", "mid_block_only_cross_attention", "cross_attention_norm"),
    *("reverse_transformer_layers_per_block", "num_attention_heads"),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PictureRow:
    """One picture, or one pass of guidance over it.

    latents   [channels, h, w]
    text      [L, text size]: the vectors of the prompt
    timestep  of training, up to 1000
    pooled    [size]: the vector of the whole prompt; None: the model wants none
    sizes     numbers about the picture's size and cut, with `pooled`
    """

    latents: Tensor
    text: Tensor
    timestep: float
    pooled: Tensor | None = None
    sizes: tuple[float, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.latents.shape[1] * self.latents.shape[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """One size of the picture, on the way down or up."""

    channels: int
    num_heads: int
    depth: int
    attends: bool
    text_size: int


class _Stage:
    """Residual blocks, each perhaps with attention after it, and perhaps a change of size."""

    def __init__(
        self,
        blocks: Sequence[ResidualBlock],
        attentions: Sequence[PictureTransformer],
        resize: Downsample | Upsample | None,
    ) -> None:
        self.blocks, self.attentions, self.resize = blocks, attentions, resize

    def pairs(self) -> Iterator[tuple[ResidualBlock, PictureTransformer | None]]:
        for index, block in enumerate(self.blocks):
            yield block, self.attentions[index] if index < len(self.attentions) else None

    def targets(self) -> dict[str, Target]:
        found: dict[str, Target] = {}
        for index, block in enumerate(self.blocks):
            found |= prefixed(f"resnets.{index}", block.targets())
        for index, attention in enumerate(self.attentions):
            found |= prefixed(f"attentions.{index}", attention.targets())
        if self.resize is not None:
            name = "upsamplers.0" if isinstance(self.resize, Upsample) else "downsamplers.0"
            found |= prefixed(name, self.resize.targets())
        return found


class UNet:
    """Rows of latents to what their noise schedule wants predicted."""

    def __init__(self, config: Mapping[str, Any], build: Build) -> None:
        """config: config.json of the component"""
        _refuse_what_is_not_implemented(config)
        self._build = build
        levels = _levels(config)
        widths = [level.channels for level in levels]
        self.in_channels = int(config.get("in_channels", 4))
        size = config.get("sample_size", 64)
        self.sample_size = int(size[0] if isinstance(size, (list, tuple)) else size)
        groups, eps = int(config.get("norm_num_groups", 32)), float(config.get("norm_eps", 1e-5))
        self._cosines_first = bool(config.get("flip_sin_to_cos", True))
        self._shift = float(config.get("freq_shift", 0))
        self._frequencies, time = widths[0], 4 * widths[0]
        self._time = EmbeddingMLP(build, widths[0], time)
        self._more: EmbeddingMLP | None = None
        self._more_frequencies = int(config.get("addition_time_embed_dim") or 0)
        if config.get("addition_embed_type") == "text_time":
            more = int(config["projection_class_embeddings_input_dim"])
            self._more = EmbeddingMLP(build, more, time)
        self._first = Conv2d(build, self.in_channels, widths[0])
        make = _StageMaker(build, config, groups=groups, eps=eps, time=time)
        depth = int(config.get("layers_per_block", 2))
        self._down = make.down(levels, depth)
        self._middle = make.middle(levels[-1])
        self._up = make.up(levels, depth + 1)
        self._norm = GroupNorm(build, groups, widths[0], eps=eps)
        self._last = Conv2d(build, widths[0], int(config.get("out_channels", 4)))

    def __call__(self, rows: Sequence[PictureRow]) -> list[Tensor]:
        """Per row [out channels, h, w]."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(rows):
            by_shape.setdefault((*row.latents.shape, *row.text.shape), []).append(index)
        found: dict[int, Tensor] = {}
        for members in by_shape.values():
            outputs = self._together([rows[index] for index in members])
            found |= dict(zip(members, outputs, strict=True))
        return [found[index] for index in range(len(rows))]

    def _together(self, rows: Sequence[PictureRow]) -> Tensor:
        """Rows of equal shapes -> [R, out channels, h, w]"""
        text = torch.stack([row.text for row in rows])
        # What every residual block begins with, once for all of them.
        time = self._build.kernels.activate(self._condition(rows), Activation.SILU)
        x = self._first(torch.stack([row.latents for row in rows]))
        kept = [x]
        for stage in self._down:
            for block, attention in stage.pairs():
                x = block(x, time)
                if attention is not None:
                    x = attention(x, text)
                kept.append(x)
            if stage.resize is not None:
                x = stage.resize(x)
                kept.append(x)
        for block, attention in self._middle.pairs():
            x = block(x, time)
            if attention is not None:
                x = attention(x, text)
        for stage in self._up:
            for block, attention in stage.pairs():
                x = block(torch.cat((x, kept.pop()), dim=1), time)
                if attention is not None:
                    x = attention(x, text)
            if isinstance(stage.resize, Upsample):
                # A side that was odd on the way down is odd again.
                height, width = kept[-1].shape[2:]
                x = stage.resize(x, (height, width))
        return self._last(self._norm.silu(x))

    def _condition(self, rows: Sequence[PictureRow]) -> Tensor:
        """[R, time]"""
        device, dtype = self._build.device, self._build.dtype
        timesteps = column([row.timestep for row in rows], device)
        time = self._time(self._waves(timesteps, self._frequencies).to(dtype))
        if self._more is None:
            return time
        sizes = column([number for row in rows for number in row.sizes], device)
        waves = self._waves(sizes, self._more_frequencies).reshape(len(rows), -1)
        pooled = torch.stack([row.pooled for row in rows if row.pooled is not None])
        return time + self._more(torch.cat((pooled.float(), waves), dim=-1).to(dtype))

    def _waves(self, numbers: Tensor, size: int) -> Tensor:
        return sinusoids(
            numbers, size, cosines_first=self._cosines_first, frequency_shift=self._shift
        )

    def targets(self) -> dict[str, Target]:
        found = prefixed("time_embedding", self._time.targets())
        if self._more is not None:
            found |= prefixed("add_embedding", self._more.targets())
        found |= prefixed("conv_in", self._first.targets())
        for index, stage in enumerate(self._down):
            found |= prefixed(f"down_blocks.{index}", stage.targets())
        found |= prefixed("mid_block", self._middle.targets())
        for index, stage in enumerate(self._up):
            found |= prefixed(f"up_blocks.{index}", stage.targets())
        found |= prefixed("conv_norm_out", self._norm.targets())
        return found | prefixed("conv_out", self._last.targets())

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()


class _StageMaker:
    """Makes the stages of a U-Net, whose blocks are alike."""

    def __init__(
        self, build: Build, config: Mapping[str, Any], *, groups: int, eps: float, time: int
    ) -> None:
        self._build, self._groups, self._eps, self._time = build, groups, eps, time
        self._is_linear = bool(config.get("use_linear_projection", False))

    def down(self, levels: Sequence[_Level], count: int) -> list[_Stage]:
        stages, before = [], levels[0].channels
        for index, level in enumerate(levels):
            inputs = [before] + [level.channels] * (count - 1)
            before = level.channels
            resize = None
            if index < len(levels) - 1:
                resize = Downsample(self._build, level.channels, pads_all_sides=True)
            stages.append(self._stage(level, inputs, resize))
        return stages

    def middle(self, level: _Level) -> _Stage:
        blocks = [self._block(level.channels, level.channels) for _ in range(2)]
        return _Stage(blocks, [self._attention(level)], None)

    def up(self, levels: Sequence[_Level], count: int) -> list[_Stage]:
        stages, before = [], levels[-1].channels
        for index, level in enumerate(reversed(levels)):
            other = levels[max(len(levels) - 2 - index, 0)].channels
            inputs = [before + level.channels] + [2 * level.channels] * (count - 1)
            inputs[-1] += other - level.channels
            before = level.channels
            resize = Upsample(self._build, level.channels) if index < len(levels) - 1 else None
            stages.append(self._stage(level, inputs, resize))
        return stages

    def _stage(
        self, level: _Level, inputs: Sequence[int], resize: Downsample | Upsample | None
    ) -> _Stage:
        blocks = [self._block(channels, level.channels) for channels in inputs]
        attentions = [self._attention(level) for _ in blocks] if level.attends else []
        return _Stage(blocks, attentions, resize)

    def _block(self, in_channels: int, out_channels: int) -> ResidualBlock:
        return ResidualBlock(
            self._build,
            in_channels,
            out_channels,
            num_groups=self._groups,
            eps=self._eps,
            time_size=self._time,
        )

    def _attention(self, level: _Level) -> PictureTransformer:
        return PictureTransformer(
            self._build,
            level.channels,
            num_heads=level.num_heads,
            depth=level.depth,
            text_size=level.text_size,
            num_groups=self._groups,
            is_linear=self._is_linear,
        )


def _levels(config: Mapping[str, Any]) -> list[_Level]:
    widths = list(config.get("block_out_channels", (320, 640, 1280, 1280)))
    kinds = list(config.get("down_block_types", ()))
    if len(kinds) != len(widths) or not {"CrossAttnDownBlock2D", "DownBlock2D"}.issuperset(kinds):
        raise ConfigError(f"a U-Net with down_block_types {kinds} is not implemented")
    mirrored = [kind.replace("Down", "Up") for kind in reversed(kinds)]
    if list(config.get("up_block_types", mirrored)) != mirrored:
        raise ConfigError("a U-Net whose up_block_types do not mirror down_block_types")

    def each(name: str, default: Any) -> list[Any]:
        value = config.get(name, default)
        values = list(value) if isinstance(value, (list, tuple)) else [value] * len(widths)
        if len(values) != len(widths):
            raise ConfigError(f"the U-Net's {name} must have {len(widths)} numbers, got {value}")
        return values

    # diffusers calls the number of heads attention_head_dim.
    heads = each("attention_head_dim", 8)
    depths = each("transformer_layers_per_block", 1)
    texts = each("cross_attention_dim", 1280)
    return [
        _Level(
            channels=widths[index],
            num_heads=heads[index],
            depth=depths[index],
            attends=kind.startswith("CrossAttn"),
            text_size=texts[index],
        )
        for index, kind in enumerate(kinds)
    ]


def _refuse_what_is_not_implemented(config: Mapping[str, Any]) -> None:
    for name, only in _ONLY.items():
        if config.get(name, only) != only:
            raise ConfigError(f"the U-Net's {name} must be {only!r}, got {config[name]!r}")
    for name in _NONE:
        if config.get(name):
            raise ConfigError(f"the U-Net's {name} is not implemented")
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise ConfigError(f"addition_embed_type {config['addition_embed_type']!r} is unknown")
