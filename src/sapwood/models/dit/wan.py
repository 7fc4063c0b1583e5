"""Wan's transformer, which draws videos. Source: Wan Team 2025, arXiv:2503.20314.

Tokens of a video attend to each other, then to the prompt. Neither the timestep nor the video
changes what a layer makes of a prompt, so that its keys and values are made once per trajectory.
Behind a short prompt a checkpoint expects zeros up to 512 tokens. Their keys are all alike: one of
them, counted as many times, takes their place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import EqualTexts, group_texts
from sapwood.layers.adaptive import Modulation, add_gated, modulated_norm
from sapwood.layers.axial_rope import AxialRope, grid
from sapwood.layers.build import Build
from sapwood.layers.masked_attention import attend
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.named_linear import NamedLinear, linear
from sapwood.layers.norm import LayerNorm, RMSNorm
from sapwood.layers.targets import Target, once_filled, prefixed
from sapwood.layers.timesteps import TimestepEmbedder
from sapwood.layers.token_rows import TokenRows, packed
from sapwood.models.dit.joint import whole_number
from sapwood.models.dit.rows import column

_PATCH = (1, 2, 2)
_CLIP_EPS = 1e-5


@dataclass(slots=True, eq=False)
class PromptKeys:
    """What the layers of one transformer have made of a prompt: (keys, values) [L, H, D] by layer,
    of its text, and of the picture that it begins with."""

    texts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pictures: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VideoRow:
    """One video, or one pass of guidance over it. Rows of a step may differ in everything.

    latents      [in channels, F, h, w], with all that lies beside them
    text         [L, text size]: the vectors of the prompt, without padding
    num_padding  zeros behind them that the model expects
    rotations    of the tokens, as the transformer's `rotations` gave them
    timestep     from 1000, all noise, to 0
    num_given    tokens, the first ones, that are no noise: their timestep is 0
    picture      [P, size] that an image encoder made of the first picture; None: there is none
    keys         of this row's prompt, in the transformer that the row is for; filled by it
    model        which of the pipeline's transformers the row is for
    """

    latents: Tensor
    text: Tensor
    num_padding: int
    rotations: Tensor
    timestep: float
    keys: PromptKeys
    num_given: int = 0
    picture: Tensor | None = None
    model: int = 0

    @property
    def num_video_tokens(self) -> int:
        return math.prod(self.latents.shape[1:]) // 4

    @property
    def num_tokens(self) -> int:
        return self.num_video_tokens + len(self.text)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VideoStep:
    """What all blocks of a step are given.

    rows       of video tokens
    parts      of the rows, which have a timestep each
    groups     rows of equal length, for attention
    rotations  [T, head_dim / 2] complex64
    padding    per row [1, 1, 1, L]: what is added to the scores of the prompt; None: nothing
    keys       per row
    """

    rows: TokenRows
    parts: TokenRows
    groups: list[EqualTexts]
    rotations: Tensor
    padding: list[Tensor | None]
    keys: list[PromptKeys]


class WanAttention:
    """Queries, keys and values, whose norms are over all heads together."""

    def __init__(self, build: Build, size: int, num_heads: int, eps: float) -> None:
        self._kernels, self._num_heads = build.kernels, num_heads
        self._head_dim = size // num_heads
        self._norms = tuple(RMSNorm(build, size, eps=eps) for _ in range(2))
        self._out = linear(build, "to_out.0", size, size)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self._num_heads, self._head_dim)

    def _common_targets(self) -> dict[str, Target]:
        found = prefixed("norm_q", self._norms[0].targets())
        return found | prefixed("norm_k", self._norms[1].targets()) | self._out.targets()


class VideoAttention(WanAttention):
    """Attention of all tokens of a video to each other."""

    def __init__(self, build: Build, size: int, num_heads: int, eps: float) -> None:
        super().__init__(build, size, num_heads, eps)
        self._qkv = NamedLinear(build, size, dict.fromkeys(("to_q", "to_k", "to_v"), size))

    def __call__(self, x: Tensor, step: VideoStep) -> Tensor:
        """x [T, size] -> the same shape"""
        q, k, v = self._qkv.split(x)
        q, k = (norm(part.contiguous()) for norm, part in zip(self._norms, (q, k), strict=True))
        q, k = (self._rotated(part, step.rotations) for part in (q, k))
        mixed = self._kernels.bidirectional_attention(
            q, k, self._heads(v).contiguous(), step.groups, self._head_dim**-0.5
        )
        return self._out(mixed.flatten(1))

    def _rotated(self, x: Tensor, rotations: Tensor) -> Tensor:
        """[T, H, D]"""
        out = torch.empty_like(self._heads(x))
        self._kernels.norm_rotate_heads(x, None, 0.0, rotations, out)
        return out

    def targets(self) -> dict[str, Target]:
        return self._common_targets() | self._qkv.targets()


class PromptAttention(WanAttention):
    """Attention of a video's tokens to its prompt, and perhaps to the picture it begins with."""

    def __init__(
        self, build: Build, size: int, num_heads: int, eps: float, *, sees_picture: bool
    ) -> None:
        super().__init__(build, size, num_heads, eps)
        self._q = linear(build, "to_q", size, size)
        self._kv = NamedLinear(build, size, dict.fromkeys(("to_k", "to_v"), size))
        self._of_picture = None
        if sees_picture:
            names = dict.fromkeys(("add_k_proj", "add_v_proj"), size)
            self._of_picture = NamedLinear(build, size, names)
            self._picture_norm = RMSNorm(build, size, eps=eps)

    def __call__(self, x: Tensor, step: VideoStep, layer: int) -> Tensor:
        """x [T, size] -> the same shape; layer: which keys are this layer's"""
        q = self._heads(self._norms[0](self._q(x)))
        mixed = []
        rows = zip(step.rows.split(q), step.keys, step.padding, strict=True)
        for own, keys, padding in rows:
            found = self._attended(own, keys.texts[layer], padding)
            if keys.pictures:
                found = found + self._attended(own, keys.pictures[layer], None)
            mixed.append(found)
        return self._out(packed(mixed))

    def keys_of(self, text: Tensor, picture: Tensor | None, into: PromptKeys) -> None:
        """text [L, size], picture [P, size]: add what this layer makes of them."""
        keys, values = self._kv.split(text)
        into.texts.append((self._heads(self._norms[1](keys.contiguous())), self._heads(values)))
        if picture is not None:
            assert self._of_picture is not None, "the model has checked that it sees pictures"
            keys, values = self._of_picture.split(picture)
            normed = self._picture_norm(keys.contiguous())
            into.pictures.append((self._heads(normed), self._heads(values)))

    def _attended(self, q: Tensor, pair: tuple[Tensor, Tensor], added: Tensor | None) -> Tensor:
        keys, values = pair
        scale = self._head_dim**-0.5
        return attend(q[None], keys[None], values[None], scale=scale, added=added)[0]

    def targets(self) -> dict[str, Target]:
        found = self._common_targets() | self._q.targets() | self._kv.targets()
        if self._of_picture is not None:
            found |= self._of_picture.targets()
            found |= prefixed("norm_added_k", self._picture_norm.targets())
        return found


class Numbers:
    """Shifts, scales and gates: those that the timestep gives, plus a layer's own."""

    def __init__(self, build: Build, size: int, count: int) -> None:
        self._table = build.empty(count, size)

    def __call__(self, condition: Tensor) -> tuple[Tensor, ...]:
        """condition [P, count, size] or [P, 1, size] -> `count` times [P, size]"""
        return (self._table + condition).unbind(1)

    def targets(self) -> dict[str, Target]:
        def put(table: Tensor) -> None:
            self._table.copy_(table[0])

        return {"scale_shift_table": Target((1, *self._table.shape), put)}


class WanBlock:
    """Attention within the video, attention to the prompt, and a feed-forward layer."""

    def __init__(self, config: WanSizes, build: Build) -> None:
        size, eps = config.size, config.eps
        self._build, self._eps = build, eps
        self._numbers = Numbers(build, size, 6)
        self._own = VideoAttention(build, size, config.num_heads, eps)
        self.prompt = PromptAttention(
            build, size, config.num_heads, eps, sees_picture=config.sees_picture
        )
        self._norm = LayerNorm(build, size, eps=eps) if config.has_prompt_norm else None
        self._mlp = PlainMLP(
            build,
            size,
            config.inner,
            activation=Activation.GELU_TANH,
            bias=True,
            names=("net.0.proj", "net.2"),
        )

    def __call__(self, x: Tensor, condition: Tensor, step: VideoStep, layer: int) -> None:
        """x [T, size] is changed in place; condition [P, 6, size]"""
        numbers = self._numbers(condition)
        add_gated(x, numbers[2], self._own(self._normed(x, step, numbers[:2]), step), step.parts)
        x += self.prompt(x if self._norm is None else self._norm(x), step, layer)
        add_gated(x, numbers[5], self._mlp(self._normed(x, step, numbers[3:5])), step.parts)

    def _normed(self, x: Tensor, step: VideoStep, numbers: tuple[Tensor, ...]) -> Tensor:
        shift, scale = numbers
        return modulated_norm(
            self._build.kernels, x, step.parts, shift=shift, scale=scale, eps=self._eps
        )

    def targets(self) -> dict[str, Target]:
        found = self._numbers.targets()
        found |= prefixed("attn1", self._own.targets()) | prefixed("attn2", self.prompt.targets())
        if self._norm is not None:
            found |= prefixed("norm2", self._norm.targets())
        return found | prefixed("ffn", once_filled(self._mlp.targets(), self._mlp.pack))


class PictureEmbedder:
    """The vectors of an image encoder in the transformer's size."""

    def __init__(self, build: Build, in_size: int, size: int) -> None:
        self._norms = (
            LayerNorm(build, in_size, eps=_CLIP_EPS),
            LayerNorm(build, size, eps=_CLIP_EPS),
        )
        self._mlp = _TwoLayers(build, in_size, in_size, size, Activation.GELU)

    def __call__(self, x: Tensor) -> Tensor:
        """x [P, in] -> [P, size]"""
        return self._norms[1](self._mlp(self._norms[0](x)))

    def targets(self) -> dict[str, Target]:
        return {
            **prefixed("norm1", self._norms[0].targets()),
            **prefixed("ff.net", self._mlp.targets("0.proj", "2")),
            **prefixed("norm2", self._norms[1].targets()),
        }


class _TwoLayers:
    """second(activation(first(x)))."""

    def __init__(
        self, build: Build, in_size: int, inner: int, size: int, activation: Activation
    ) -> None:
        self._first = linear(build, "first", in_size, inner)
        self._second = linear(build, "second", inner, size)
        self._kernels, self._activation = build.kernels, activation

    def __call__(self, x: Tensor) -> Tensor:
        return self._second(self._kernels.activate(self._first(x), self._activation))

    def targets(self, first: str, second: str) -> dict[str, Target]:
        found = {}
        for layer, own, name in (
            (self._first, "first", first),
            (self._second, "second", second),
        ):
            for key, target in layer.targets().items():
                found[key.replace(own, name, 1)] = target
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class WanSizes:
    """What config.json says of the blocks."""

    size: int
    num_heads: int
    inner: int
    eps: float
    has_prompt_norm: bool
    sees_picture: bool

    @staticmethod
    def of(config: Mapping[str, Any]) -> WanSizes:
        num_heads = whole_number(config, "num_attention_heads", 40)
        return WanSizes(
            size=num_heads * whole_number(config, "attention_head_dim", 128),
            num_heads=num_heads,
            inner=whole_number(config, "ffn_dim", 13824),
            eps=float(config.get("eps", 1e-6)),
            has_prompt_norm=bool(config.get("cross_attn_norm", True)),
            sees_picture=config.get("added_kv_proj_dim") is not None,
        )


class WanTransformer:
    """Rows of video tokens and prompts to the velocity of each latent."""

    def __init__(self, config: Mapping[str, Any], build: Build) -> None:
        """config: config.json of the component"""
        if tuple(config.get("patch_size", _PATCH)) != _PATCH:
            raise ConfigError(f"Wan's patch_size {config['patch_size']} is not implemented")
        if config.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
            raise ConfigError(f"Wan's qk_norm {config['qk_norm']!r} is not implemented")
        if config.get("pos_embed_seq_len") is not None:
            raise ConfigError("Wan's pos_embed_seq_len (first and last frame) is not implemented")
        sizes = WanSizes.of(config)
        size, self._eps = sizes.size, sizes.eps
        self._build = build
        self.in_channels = whole_number(config, "in_channels", 16)
        self.out_channels = int(config.get("out_channels") or self.in_channels)
        self.text_size = whole_number(config, "text_dim", 4096)
        head_dim = size // sizes.num_heads
        side = 2 * (head_dim // 6)
        self._rope = AxialRope((head_dim - 2 * side, side, side), 10_000.0, build.device)
        self._patches = linear(build, "patch_embedding", 4 * self.in_channels, size)
        frequencies = whole_number(config, "freq_dim", 256)
        self._timestep = TimestepEmbedder(build, size, frequencies=frequencies)
        self._of_timestep = Modulation(build, "time_proj", size, size, 6)
        self._text = _TwoLayers(build, self.text_size, size, size, Activation.GELU_TANH)
        image_size = config.get("image_dim")
        self.picture = None
        if image_size is not None:
            self.picture = PictureEmbedder(build, int(image_size), size)
        count = whole_number(config, "num_layers", 40)
        self._blocks = [WanBlock(sizes, build) for _ in range(count)]
        self._last_numbers = Numbers(build, size, 2)
        self._out = linear(build, "proj_out", size, 4 * self.out_channels)

    def rotations(self, size: tuple[int, int, int]) -> Tensor:
        """Of a video's tokens. size: latents in time, height and width"""
        return self._rope(grid(size[0], size[1] // 2, size[2] // 2))

    def __call__(self, rows: Sequence[VideoRow]) -> list[Tensor]:
        """Per row [out channels, F, h, w], in the model's dtype."""
        device = self._build.device
        for row in rows:
            if not row.keys.texts:
                self._read_prompt(row)
        x = self._patches(packed([_tokens(row.latents).to(self._build.dtype) for row in rows]))
        step, timesteps = self._step_of(rows)
        condition = self._timestep(column(timesteps, device))
        of_blocks = torch.stack(self._of_timestep(condition), dim=1)
        for layer, block in enumerate(self._blocks):
            block(x, of_blocks, step, layer)
        shift, scale = self._last_numbers(condition[:, None])
        normed = modulated_norm(
            self._build.kernels, x, step.parts, shift=shift, scale=scale, eps=self._eps
        )
        split = step.rows.split(self._out(normed))
        return [
            _video(own, (self.out_channels, *row.latents.shape[1:]))
            for own, row in zip(split, rows, strict=True)
        ]

    def _step_of(self, rows: Sequence[VideoRow]) -> tuple[VideoStep, list[float]]:
        """What the blocks are given, and the timestep of each part."""
        lengths: list[int] = []
        timesteps: list[float] = []
        for row in rows:
            if row.num_given:
                lengths.append(row.num_given)
                timesteps.append(0.0)
            if row.num_given < row.num_video_tokens:
                lengths.append(row.num_video_tokens - row.num_given)
                timesteps.append(row.timestep)
        own = TokenRows(tuple(row.num_video_tokens for row in rows))
        step = VideoStep(
            rows=own,
            parts=TokenRows(tuple(lengths)),
            groups=group_texts(own.lengths, self._build.device),
            rotations=packed([row.rotations for row in rows]),
            padding=[self._padding(row) for row in rows],
            keys=[row.keys for row in rows],
        )
        return step, timesteps

    def _padding(self, row: VideoRow) -> Tensor | None:
        """A key that counts n times has log n added to its score."""
        if row.num_padding < 1:
            return None
        added = torch.zeros(1, 1, 1, len(row.text) + 1, dtype=self._build.dtype)
        added[..., -1] = math.log(row.num_padding)
        return added.to(self._build.device)

    def _read_prompt(self, row: VideoRow) -> None:
        text = row.text
        if row.num_padding:
            text = F.pad(text, (0, 0, 0, 1))
        text = self._text(text.to(self._build.dtype))
        picture = None
        if row.picture is not None and self.picture is not None:
            picture = self.picture(row.picture.to(self._build.dtype))
        for block in self._blocks:
            block.prompt.keys_of(text, picture, row.keys)

    def targets(self) -> dict[str, Target]:
        own = "condition_embedder"
        found = prefixed(f"{own}.time_embedder", self._timestep.targets())
        found |= prefixed(own, self._of_timestep.targets())
        found |= prefixed(f"{own}.text_embedder", self._text.targets("linear_1", "linear_2"))
        if self.picture is not None:
            found |= prefixed(f"{own}.image_embedder", self.picture.targets())
        found |= self._patch_targets() | self._last_numbers.targets() | self._out.targets()
        for index, block in enumerate(self._blocks):
            found |= prefixed(f"blocks.{index}", block.targets())
        return found

    def _patch_targets(self) -> dict[str, Target]:
        """The checkpoint has a convolution of patches."""
        found = self._patches.targets()
        name = "patch_embedding.weight"
        weight = found[name]

        def put(kernel: Tensor) -> None:
            weight.put(kernel.flatten(1))

        return found | {name: Target((weight.shape[0], self.in_channels, *_PATCH), put)}

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ("*.norm_added_q.*",)


def _tokens(latents: Tensor) -> Tensor:
    """latents [channels, F, h, w] -> [F * h/2 * w/2, channels * 4]: four of a frame are a token"""
    channels, frames, height, width = latents.shape
    blocks = latents.reshape(channels, frames, height // 2, 2, width // 2, 2)
    return blocks.permute(1, 2, 4, 0, 3, 5).reshape(-1, 4 * channels)


def _video(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse; a token's outputs come pixel after pixel, not channel after channel."""
    channels, frames, height, width = shape
    blocks = tokens.reshape(frames, height // 2, width // 2, 2, 2, channels)
    return blocks.permute(5, 0, 1, 3, 2, 4).reshape(shape)
