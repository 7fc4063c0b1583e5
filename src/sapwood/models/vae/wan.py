"""The autoencoders of Wan 2.1 and Wan 2.2, which code videos. Source: Wan Team 2025,
arXiv:2503.20314.

A video goes through in pieces: first one frame, then four by four, which are one latent each. What
a layer needs of the frames before is kept in a `Past`, so that pieces give what the whole video
would. Frames are [T, channels, height, width]: all but a few layers see pictures."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.layers.build import Build
from sapwood.layers.convolution import convolve, kernel_of
from sapwood.layers.targets import Target, prefixed, whole
from sapwood.models.vae.qwen_image import ChannelNorm, FrameAttention, FrameDownsample, PlainConv
from sapwood.models.vae.tiles import Tiling, compute_tiled

_TILE = 256
"""Pixels of a tile's side."""
_STEP = 4
"""Frames that become one latent, after the first one."""


class Past(dict[int, Tensor]):
    """What the layers of one video have seen of its frames so far, by the layer's id."""


class CausalConv:
    """A convolution over a frame and the two before it; before the first one all is 0."""

    def __init__(
        self, build: Build, in_channels: int, out_channels: int, kernel: int = 3, *, times: int = 3
    ) -> None:
        """kernel: pixels of a side; times: frames, 3 or 1"""
        self._times, self._in_channels, self._kernel = times, in_channels, kernel
        # The frames that one output sees lie side by side, as further channels.
        self._weight = kernel_of(build, out_channels, times * in_channels, kernel)
        self._bias = build.empty(out_channels)

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """x [T, in, H, W], the frames after those of `past` -> [T, out, H, W]"""
        padding = self._kernel // 2
        if self._times == 1:
            return convolve(x, self._weight, self._bias, padding=padding)
        before = past.get(id(self))
        if before is None and len(x) == 1:
            past[id(self)] = torch.cat((torch.zeros_like(x), x))
            newest = self._weight[:, 2 * self._in_channels :]
            return convolve(x, newest, self._bias, padding=padding)
        if before is None:
            before = torch.zeros_like(x[:1]).expand(2, -1, -1, -1)
        seen = torch.cat((before, x))
        past[id(self)] = seen[-2:].clone()
        beside = torch.cat((seen[:-2], seen[1:-1], seen[2:]), dim=1)
        return convolve(beside, self._weight, self._bias, padding=padding)

    def targets(self) -> dict[str, Target]:
        out_channels = len(self._weight)
        size = self._kernel

        def put(weight: Tensor) -> None:
            apart = weight.permute(0, 2, 1, 3, 4)
            self._weight.copy_(apart.reshape(self._weight.shape))

        shape = (out_channels, self._in_channels, self._times, size, size)
        return {"weight": Target(shape, put), "bias": whole(self._bias)}


class CausalBlock:
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, build: Build, in_channels: int, out_channels: int) -> None:
        self._norm1 = ChannelNorm(build, in_channels, axes=3)
        self._conv1 = CausalConv(build, in_channels, out_channels)
        self._norm2 = ChannelNorm(build, out_channels, axes=3)
        self._conv2 = CausalConv(build, out_channels, out_channels)
        self._shortcut = None
        if in_channels != out_channels:
            self._shortcut = CausalConv(build, in_channels, out_channels, 1, times=1)

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        inner = self._conv1(self._norm1.silu(x), past)
        inner = self._conv2(self._norm2.silu(inner), past)
        return inner.add_(x if self._shortcut is None else self._shortcut(x, past))

    def targets(self) -> dict[str, Target]:
        parts: dict[str, ChannelNorm | CausalConv] = {
            "norm1": self._norm1,
            "conv1": self._conv1,
            "norm2": self._norm2,
            "conv2": self._conv2,
        }
        if self._shortcut is not None:
            parts["conv_shortcut"] = self._shortcut
        return _joined(parts)


class StillAttention:
    """FrameAttention, which has no past."""

    def __init__(self, build: Build, channels: int) -> None:
        self._attention = FrameAttention(build, channels)

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        # Frame by frame: the scores of all of them at once would take much memory.
        return torch.cat([self._attention(frame) for frame in torch.split(x, 1)])

    def targets(self) -> dict[str, Target]:
        return self._attention.targets()


class VideoUpsample:
    """Every pixel becomes four, and where `doubles`, every frame after the first becomes two."""

    def __init__(self, build: Build, channels: int, out_channels: int, *, doubles: bool) -> None:
        self._conv = PlainConv(build, channels, out_channels, 3)
        self._time = None
        if doubles:
            self._time = CausalConv(build, channels, 2 * channels, 1)

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        if self._time is not None:
            if id(self) in past:
                count, channels, height, width = x.shape
                pairs = self._time(x, past).reshape(count, 2, channels, height, width)
                x = pairs.flatten(0, 1)
            else:
                # Time begins after the first frame: the convolution has not seen it.
                past[id(self)] = x[:0]
        return self._conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def targets(self) -> dict[str, Target]:
        found = prefixed("resample.1", self._conv.targets())
        return found if self._time is None else found | prefixed("time_conv", self._time.targets())


class VideoDownsample:
    """Four pixels become one, and where `halves`, two frames after a video's first become one."""

    def __init__(self, build: Build, channels: int, *, halves: bool) -> None:
        self._down = FrameDownsample(build, channels)
        self._time = CausalConv(build, channels, channels, 1) if halves else None

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        x = self._down(x)
        if self._time is None:
            return x
        before = past.get(id(self))
        past[id(self)] = x[-1:].clone()
        if before is None:
            return x
        return self._time_halved(torch.cat((before, x)))

    def _time_halved(self, x: Tensor) -> Tensor:
        """x [1 + T, …] with T even -> [T / 2, …]: every other output of the convolution"""
        assert self._time is not None
        own = Past()
        own[id(self._time)] = x[:2]
        return self._time(x[2:], own)[::2]

    def targets(self) -> dict[str, Target]:
        found = self._down.targets()
        return found if self._time is None else found | prefixed("time_conv", self._time.targets())


class Part(Protocol):
    def __call__(self, x: Tensor, past: Past) -> Tensor: ...

    def targets(self) -> dict[str, Target]: ...


class ShortcutDown:
    """A level of Wan 2.2's encoder: its parts, plus means of the pixels that become one.

    time, space  by how much frames and sides become fewer"""

    def __init__(
        self,
        parts: Sequence[tuple[str, Part]],
        channels: tuple[int, int],
        *,
        time: int,
        space: int,
    ) -> None:
        self._parts = parts
        self._in, self._out = channels
        self._time, self._space = time, space

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        short = self._means(x)
        for _, part in self._parts:
            x = part(x, past)
        return x + short

    def _means(self, x: Tensor) -> Tensor:
        time, space = self._time, self._space
        missing = -len(x) % time
        if missing:
            x = torch.cat((x.new_zeros(missing, *x.shape[1:]), x))
        frames, channels, height, width = x.shape
        blocks = x.reshape(
            frames // time, time, channels, height // space, space, width // space, space
        )
        # A channel's values of one block lie together, the frame slowest.
        spread = blocks.permute(0, 2, 1, 4, 6, 3, 5).reshape(
            frames // time, self._out, -1, height // space, width // space
        )
        return spread.mean(dim=2)

    def targets(self) -> dict[str, Target]:
        return _joined(dict(self._parts))


class ShortcutUp:
    """A level of Wan 2.2's decoder: its parts, plus copies of its input.

    time, space  by how much frames and sides become more"""

    def __init__(
        self,
        parts: Sequence[tuple[str, Part]],
        channels: tuple[int, int],
        *,
        time: int,
        space: int,
    ) -> None:
        self._parts = parts
        self._in, self._out = channels
        self._time, self._space = time, space

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        is_first = id(self) not in past
        past[id(self)] = x[:0]
        short = self._copies(x)
        if is_first:
            short = short[self._time - 1 :]
        for _, part in self._parts:
            x = part(x, past)
        return x + short

    def _copies(self, x: Tensor) -> Tensor:
        time, space = self._time, self._space
        repeats = self._out * time * space * space // self._in
        frames, _, height, width = x.shape
        copied = x.repeat_interleave(repeats, dim=1)
        apart = copied.reshape(frames, self._out, time, space, space, height, width)
        return apart.permute(0, 2, 1, 5, 3, 6, 4).reshape(
            frames * time, self._out, height * space, width * space
        )

    def targets(self) -> dict[str, Target]:
        return _joined(dict(self._parts))


class _Half:
    """The encoder, or the decoder: their parts by name, in the order of the computation."""

    def __init__(
        self, parts: Sequence[tuple[str, Part]], ends: tuple[CausalConv, ChannelNorm, CausalConv]
    ) -> None:
        self._parts = parts
        self._first, self._norm, self._last = ends

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        x = self._first(x, past)
        for _, part in self._parts:
            x = part(x, past)
        return self._last(self._norm.silu(x), past)

    def targets(self) -> dict[str, Target]:
        found = prefixed("conv_in", self._first.targets()) | _joined(dict(self._parts))
        found |= prefixed("norm_out", self._norm.targets())
        return found | prefixed("conv_out", self._last.targets())


class AutoencoderKLWan:
    """Videos in -1..1 to latents that a diffusion model is given, and back.

    scale       pixels per latent, in height and in width
    frame_step  frames per latent, after the first frame, which has one of its own
    tiles       whether large videos are computed tile by tile, which changes them a little
    """

    frame_step = _STEP

    def __init__(self, config: Mapping[str, Any], build: Build) -> None:
        """config: config.json of the component"""
        if config.get("attn_scales"):
            raise ConfigError("the autoencoder's attn_scales are not implemented")
        latents = self.latent_channels = int(config.get("z_dim", 16))
        multiples = tuple(config.get("dim_mult", (1, 2, 4, 4)))
        halves = tuple(config.get("temperal_downsample", (False, True, True)))
        if len(halves) != len(multiples) - 1 or sum(halves) != 2:
            raise ConfigError(
                f"the autoencoder's temperal_downsample {list(halves)} is not implemented: of "
                f"{len(multiples) - 1} levels two must halve the frames"
            )
        self._patch = int(config.get("patch_size") or 1)
        self.scale = self._patch * 2 ** (len(multiples) - 1)
        self.dtype, self.device = build.dtype, build.device
        self.tiles = False
        self._mean, self._deviation = (
            torch.tensor(config[name], dtype=torch.float32, device=build.device)[:, None, None]
            for name in ("latents_mean", "latents_std")
        )
        shape = _Shape(
            build=build,
            multiples=multiples,
            depth=int(config.get("num_res_blocks", 2)),
            halves=halves,
            is_residual=bool(config.get("is_residual", False)),
        )
        base = int(config.get("base_dim", 96))
        self._encoder = shape.encoder(base, int(config.get("in_channels", 3)), 2 * latents)
        base = int(config.get("decoder_base_dim") or base)
        self._decoder = shape.decoder(base, latents, int(config.get("out_channels", 3)))
        self._after = CausalConv(build, 2 * latents, 2 * latents, 1, times=1)
        self._before = CausalConv(build, latents, latents, 1, times=1)

    def decode_video(self, latents: Tensor) -> Generator[None, None, Tensor]:
        """latents [channels, F, h, w], as a diffusion model has them -> frames
        [1 + 4 (F - 1), 3, H, W]; yields after each latent of time, or each tile."""
        frames = latents.transpose(0, 1)
        own = (frames * self._deviation + self._mean).to(self.dtype)
        tiling = Tiling.of(_TILE // self.scale, _TILE // self._patch)
        if self.tiles and tiling.is_needed(own):
            found = yield from compute_tiled(own, self._decode_at_once, tiling)
        else:
            found = yield from self._decoded(own)
        return self._from_patches(found).clamp_(-1.0, 1.0)

    def encode_video(self, frames: Tensor) -> Generator[None, None, Tensor]:
        """frames [1 + 4 n, 3, H, W] in -1..1 -> the most probable latents [channels, 1 + n, h, w];
        yields as decode_video."""
        own = self._to_patches(frames.to(self.dtype))
        tiling = Tiling.of(_TILE // self._patch, _TILE // self.scale)
        if self.tiles and tiling.is_needed(own):
            moments = yield from compute_tiled(own, self._encode_at_once, tiling)
        else:
            moments = yield from self._encoded(own)
        found = (moments.chunk(2, dim=1)[0] - self._mean) / self._deviation
        return found.transpose(0, 1)

    def _decoded(self, latents: Tensor) -> Generator[None, None, Tensor]:
        past = Past()
        found: list[Tensor] = []
        for latent in torch.split(latents, 1):
            if found:
                yield
            found.append(self._decoder(self._before(latent, past), past))
        return torch.cat(found)

    def _encoded(self, frames: Tensor) -> Generator[None, None, Tensor]:
        past = Past()
        found: list[Tensor] = []
        for piece in (frames[:1], *torch.split(frames[1:], _STEP)):
            if not len(piece):
                continue
            if found:
                yield
            found.append(self._after(self._encoder(piece, past), past))
        return torch.cat(found)

    def _decode_at_once(self, latents: Tensor) -> Tensor:
        return _all_of(self._decoded(latents))

    def _encode_at_once(self, frames: Tensor) -> Tensor:
        return _all_of(self._encoded(frames))

    def _to_patches(self, frames: Tensor) -> Tensor:
        """[T, 3, H, W] -> [T, 3 * p * p, H / p, W / p]; columns of a patch are slower than rows"""
        p = self._patch
        if p == 1:
            return frames
        count, channels, height, width = frames.shape
        blocks = frames.reshape(count, channels, height // p, p, width // p, p)
        return blocks.permute(0, 1, 5, 3, 2, 4).reshape(
            count, channels * p * p, height // p, width // p
        )

    def _from_patches(self, frames: Tensor) -> Tensor:
        p = self._patch
        if p == 1:
            return frames
        count, channels, height, width = frames.shape
        blocks = frames.reshape(count, channels // (p * p), p, p, height, width)
        return blocks.permute(0, 1, 4, 3, 5, 2).reshape(count, -1, height * p, width * p)

    def targets(self) -> dict[str, Target]:
        found = prefixed("encoder", self._encoder.targets())
        found |= prefixed("decoder", self._decoder.targets())
        found |= prefixed("quant_conv", self._after.targets())
        return found | prefixed("post_quant_conv", self._before.targets())

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()


class _Shape:
    """Builds the two halves of a config.json."""

    def __init__(
        self,
        *,
        build: Build,
        multiples: Sequence[int],
        depth: int,
        halves: Sequence[bool],
        is_residual: bool,
    ) -> None:
        self._build, self._multiples, self._depth = build, multiples, depth
        self._halves, self._is_residual = halves, is_residual

    def encoder(self, base: int, colours: int, out_channels: int) -> _Half:
        build = self._build
        widths = [base * multiple for multiple in self._multiples]
        parts: list[tuple[str, Part]] = []
        before = base
        for level, width in enumerate(widths):
            is_last = level == len(widths) - 1
            halves = not is_last and self._halves[level]
            blocks: list[Part] = []
            for place in range(self._depth):
                blocks.append(CausalBlock(build, before if place == 0 else width, width))
            down = None if is_last else VideoDownsample(build, width, halves=halves)
            if self._is_residual:
                own = [(f"resnets.{place}", block) for place, block in enumerate(blocks)]
                if down is not None:
                    own.append(("downsampler", down))
                made = ShortcutDown(
                    own,
                    (before, width),
                    time=2 if halves else 1,
                    space=1 if is_last else 2,
                )
                parts.append((f"down_blocks.{level}", made))
            else:
                for part in (*blocks, *([] if down is None else [down])):
                    parts.append((f"down_blocks.{len(parts)}", part))
            before = width
        parts += _middle(build, widths[-1])
        ends = (
            CausalConv(build, colours, base),
            ChannelNorm(build, widths[-1], axes=3),
            CausalConv(build, widths[-1], out_channels),
        )
        return _Half(parts, ends)

    def decoder(self, base: int, latents: int, colours: int) -> _Half:
        build = self._build
        widths = [base * multiple for multiple in reversed(self._multiples)]
        doubles = tuple(reversed(self._halves))
        parts = _middle(build, widths[0])
        before = widths[0]
        for level, width in enumerate(widths):
            is_last = level == len(widths) - 1
            name = f"up_blocks.{level}"
            own: list[tuple[str, Part]] = []
            for place in range(self._depth + 1):
                block = CausalBlock(build, before if place == 0 else width, width)
                own.append((f"resnets.{place}", block))
            after = width
            if not is_last:
                after = width if self._is_residual else width // 2
                up = VideoUpsample(build, width, after, doubles=doubles[level])
                own.append(("upsampler" if self._is_residual else "upsamplers.0", up))
            if self._is_residual and not is_last:
                made = ShortcutUp(own, (before, width), time=2 if doubles[level] else 1, space=2)
                parts.append((name, made))
            else:
                parts += [(f"{name}.{part}", made) for part, made in own]
            before = after
        ends = (
            CausalConv(build, latents, widths[0]),
            ChannelNorm(build, widths[-1], axes=3),
            CausalConv(build, widths[-1], colours),
        )
        return _Half(parts, ends)


def _middle(build: Build, channels: int) -> list[tuple[str, Part]]:
    return [
        ("mid_block.resnets.0", CausalBlock(build, channels, channels)),
        ("mid_block.attentions.0", StillAttention(build, channels)),
        ("mid_block.resnets.1", CausalBlock(build, channels, channels)),
    ]


def _joined(parts: Mapping[str, Any]) -> dict[str, Target]:
    return {
        name: target
        for prefix, part in parts.items()
        for name, target in prefixed(prefix, part.targets()).items()
    }


def _all_of(work: Generator[None, None, Tensor]) -> Tensor:
    while True:
        try:
            next(work)
        except StopIteration as end:
            found: Tensor = end.value
            return found
