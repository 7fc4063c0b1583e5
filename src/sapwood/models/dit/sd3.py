"""The transformer of Stable Diffusion 3 and 3.5. Source: Esser et al. 2024, arXiv:2403.03206."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError, InvalidRequest
from sapwood.kernels.texts import EqualTexts, group_texts
from sapwood.layers.adaptive import Modulation, add_gated, modulated_norm
from sapwood.layers.build import Build
from sapwood.layers.named_linear import linear
from sapwood.layers.targets import Target, prefixed
from sapwood.layers.timesteps import EmbeddingMLP, TimestepEmbedder
from sapwood.layers.token_rows import JointRows, TokenRows, packed
from sapwood.models.dit.joint import (
    GeluMLP,
    HeadSizes,
    JointAttention,
    JointStep,
    Projections,
    feed_forward,
    whole_number,
)
from sapwood.models.dit.rows import DenoisingRow, column

EPS = 1e-6


class PictureAttention:
    """Attention of the picture's tokens to each other alone."""

    def __init__(self, build: Build, size: int, heads: HeadSizes) -> None:
        self._kernels = build.kernels
        self._scale = heads.head_dim**-0.5
        self._projections = Projections(
            build, size, heads, names=("to_q", "to_k", "to_v"), norms=("norm_q", "norm_k")
        )
        self._out = linear(build, "to_out.0", heads.width, size)

    def __call__(self, x: Tensor, groups: list[EqualTexts]) -> Tensor:
        q, k, v, _ = self._projections(x, None)
        mixed = self._kernels.bidirectional_attention(q, k, v, groups, self._scale)
        return self._out(mixed.flatten(1))

    def targets(self) -> dict[str, Target]:
        return self._projections.targets() | self._out.targets()


class SD3Block:
    """Text and picture with weights of their own; in the last block the text only helps."""

    def __init__(
        self, build: Build, size: int, heads: HeadSizes, *, is_last: bool, is_dual: bool
    ) -> None:
        """is_dual: whether the picture attends to itself alone, too"""
        self._build = build
        self._numbers = Modulation(build, "norm1.linear", size, size, 9 if is_dual else 6)
        count = 2 if is_last else 6
        self._text_numbers = Modulation(build, "norm1_context.linear", size, size, count)
        self._attention = JointAttention(build, size, heads, text_out=not is_last)
        self._own = PictureAttention(build, size, heads) if is_dual else None
        self._mlp = GeluMLP(build, size)
        self._text_mlp = None if is_last else GeluMLP(build, size)

    def __call__(
        self,
        text: Tensor,
        picture: Tensor,
        condition: Tensor,
        step: JointStep,
        groups: list[EqualTexts],
    ) -> None:
        """text [T1, size] and picture [T2, size] are changed in place; groups: of pictures"""
        kernels, rows = self._build.kernels, step.rows
        numbers = self._numbers(condition)
        of_text = self._text_numbers(condition)
        # The last block's two numbers of the text come in the other order.
        scale, shift = of_text if self._text_mlp is None else (of_text[1], of_text[0])
        normed_text = modulated_norm(kernels, text, rows.first, shift=shift, scale=scale, eps=EPS)
        normed = modulated_norm(
            kernels, picture, rows.second, shift=numbers[0], scale=numbers[1], eps=EPS
        )
        own = None
        if self._own is not None:
            alone = modulated_norm(
                kernels, picture, rows.second, shift=numbers[6], scale=numbers[7], eps=EPS
            )
            own = self._own(alone, groups)
        text_mixed, mixed = self._attention(normed_text, normed, step)
        add_gated(picture, numbers[2], mixed, rows.second)
        if own is not None:
            add_gated(picture, numbers[8], own, rows.second)
        feed_forward(self._build, self._mlp, picture, rows.second, numbers[3:6])
        if self._text_mlp is not None:
            add_gated(text, of_text[2], text_mixed, rows.first)
            feed_forward(self._build, self._text_mlp, text, rows.first, of_text[3:])

    def targets(self) -> dict[str, Target]:
        found = self._numbers.targets() | self._text_numbers.targets()
        found |= prefixed("attn", self._attention.targets())
        found |= prefixed("ff", self._mlp.targets())
        if self._own is not None:
            found |= prefixed("attn2", self._own.targets())
        if self._text_mlp is not None:
            found |= prefixed("ff_context", self._text_mlp.targets())
        return found


class SD3Transformer:
    """Rows of text and picture tokens to the velocity of each picture token."""

    def __init__(self, config: Mapping[str, Any], build: Build) -> None:
        """config: config.json of the component"""
        if config.get("patch_size", 2) != 2 or not config.get("pos_embed_max_size", 96):
            raise ConfigError("Stable Diffusion 3 wants patch_size 2 and a pos_embed_max_size")
        norm = config.get("qk_norm")
        if norm not in (None, "rms_norm"):
            raise ConfigError(f"qk_norm {norm!r} is not implemented; known: rms_norm")
        heads = HeadSizes(
            num_heads=whole_number(config, "num_attention_heads", 18),
            head_dim=whole_number(config, "attention_head_dim", 64),
            norm_eps=EPS if norm else None,
        )
        size = heads.width
        self.in_channels = whole_number(config, "in_channels", 16)
        self.text_size = whole_number(config, "joint_attention_dim", 4096)
        self._out_channels = int(config.get("out_channels") or self.in_channels)
        self._build = build
        self._most = whole_number(config, "pos_embed_max_size", 96)
        self._positions = build.empty(self._most, self._most, size)
        self._timestep = TimestepEmbedder(build, size)
        pooled = whole_number(config, "pooled_projection_dim", 2048)
        self._pooled = EmbeddingMLP(build, pooled, size)
        self._text_in = linear(build, "context_embedder", self.text_size, size)
        self._picture_in = linear(build, "pos_embed.proj", 4 * self.in_channels, size)
        count = whole_number(config, "num_layers", 18)
        dual = set(config.get("dual_attention_layers", ()))
        self._blocks = [
            SD3Block(build, size, heads, is_last=index == count - 1, is_dual=index in dual)
            for index in range(count)
        ]
        self._last_numbers = Modulation(build, "norm_out.linear", size, size, 2)
        self._out = linear(build, "proj_out", size, 4 * self._out_channels)

    def positions(self, size: tuple[int, int]) -> Tensor:
        """[S, size of a token]: vectors of the middle of the largest picture. size: of the patches

        Raises InvalidRequest for a picture that is larger."""
        if max(size) > self._most:
            raise InvalidRequest(
                f"this model draws at most {self._most} patches in height and in width, but "
                f"{size[0]} and {size[1]} were asked for; ask for a smaller size",
                param="size",
            )
        top, left = ((self._most - side) // 2 for side in size)
        own = self._positions[top : top + size[0], left : left + size[1]]
        return own.reshape(size[0] * size[1], -1)

    def __call__(self, rows: Sequence[DenoisingRow]) -> list[Tensor]:
        """As DiffusionTransformer."""
        device = self._build.device
        condition = self._timestep(column([row.timestep for row in rows], device))
        pooled = [row.pooled for row in rows if row.pooled is not None]
        condition = condition + self._pooled(torch.stack(pooled))
        tokens = JointRows(
            TokenRows.of([row.text for row in rows]), TokenRows.of([row.latents for row in rows])
        )
        step = JointStep.of(tokens, None, device)
        groups = group_texts(tokens.second.lengths, device)
        text = self._text_in(packed([row.text for row in rows]))
        picture = self._picture_in(packed([row.latents for row in rows]))
        picture += packed([row.rotations for row in rows])
        for block in self._blocks:
            block(text, picture, condition, step, groups)
        scale, shift = self._last_numbers(condition)
        normed = modulated_norm(
            self._build.kernels, picture, tokens.second, shift=shift, scale=scale, eps=EPS
        )
        # A token's outputs come pixel after pixel; its inputs, channel after channel.
        out = self._out(normed).view(-1, 4, self._out_channels).transpose(1, 2).flatten(1)
        return list(tokens.second.split(out))

    def targets(self) -> dict[str, Target]:
        found = prefixed("time_text_embed.timestep_embedder", self._timestep.targets())
        found |= prefixed("time_text_embed.text_embedder", self._pooled.targets())
        for layer in (self._text_in, self._last_numbers, self._out):
            found |= layer.targets()
        found |= self._patch_targets()
        for index, block in enumerate(self._blocks):
            found |= prefixed(f"transformer_blocks.{index}", block.targets())
        return found

    def _patch_targets(self) -> dict[str, Target]:
        """The checkpoint has a convolution of patches, and positions in one row."""
        found = self._picture_in.targets()
        name = "pos_embed.proj.weight"
        weight, positions = found[name], self._positions
        shape = (weight.shape[0], self.in_channels, 2, 2)

        def put(kernel: Tensor) -> None:
            weight.put(kernel.flatten(1))

        def put_positions(table: Tensor) -> None:
            positions.copy_(table.view_as(positions))

        table = (1, self._most**2, positions.shape[2])
        return found | {
            name: Target(shape, put),
            "pos_embed.pos_embed": Target(table, put_positions),
        }

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()
