"""Qwen-Image's transformer. Source: Wu et al. 2025, arXiv:2508.02324."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.layers.adaptive import Modulation, add_gated, modulated_norm
from sapwood.layers.axial_rope import AxialRope, grid
from sapwood.layers.build import Build
from sapwood.layers.named_linear import linear
from sapwood.layers.norm import RMSNorm
from sapwood.layers.targets import Target, prefixed
from sapwood.layers.timesteps import TimestepEmbedder
from sapwood.layers.token_rows import JointRows, TokenRows, packed
from sapwood.models.dit.joint import (
    GeluMLP,
    HeadSizes,
    JointAttention,
    JointStep,
    feed_forward,
    whole_number,
)
from sapwood.models.dit.rows import DenoisingRow, column

EPS = 1e-6


class QwenImageBlock:
    """Text and picture with weights of their own.

    Where pictures to look at have the timestep 0, the tokens of a row's latents and those of what
    it looks at are two parts with numbers of their own."""

    def __init__(self, build: Build, size: int, heads: HeadSizes) -> None:
        self._build = build
        self._picture_numbers = Modulation(build, "img_mod.1", size, size, 6)
        self._text_numbers = Modulation(build, "txt_mod.1", size, size, 6)
        self._attention = JointAttention(build, size, heads)
        self._mlp = GeluMLP(build, size)
        self._text_mlp = GeluMLP(build, size)

    def __call__(
        self,
        text: Tensor,
        picture: Tensor,
        conditions: tuple[Tensor, Tensor],
        parts: TokenRows,
        step: JointStep,
    ) -> None:
        """text [T1, size] and picture [T2, size] are changed in place

        conditions  of texts [R, size] and of the parts of pictures [P, size]
        parts       of the picture tokens, which have a timestep each
        """
        kernels, texts = self._build.kernels, step.rows.first
        of_text = self._text_numbers(conditions[0])
        numbers = self._picture_numbers(conditions[1])
        normed = [
            modulated_norm(kernels, x, own, shift=of[0], scale=of[1], eps=EPS)
            for x, own, of in ((text, texts, of_text), (picture, parts, numbers))
        ]
        text_mixed, mixed = self._attention(normed[0], normed[1], step)
        add_gated(picture, numbers[2], mixed, parts)
        add_gated(text, of_text[2], text_mixed, texts)
        feed_forward(self._build, self._mlp, picture, parts, numbers[3:])
        feed_forward(self._build, self._text_mlp, text, texts, of_text[3:])

    def targets(self) -> dict[str, Target]:
        return {
            **self._picture_numbers.targets(),
            **self._text_numbers.targets(),
            **prefixed("attn", self._attention.targets()),
            **prefixed("img_mlp", self._mlp.targets()),
            **prefixed("txt_mlp", self._text_mlp.targets()),
        }


class QwenImageTransformer:
    """Rows of text and picture tokens to the velocity of each picture token."""

    def __init__(self, config: Mapping[str, Any], build: Build) -> None:
        """config: config.json of the component"""
        for name in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
            if config.get(name):
                raise ConfigError(f"Qwen-Image's {name} is not implemented")
        heads = HeadSizes(
            num_heads=whole_number(config, "num_attention_heads", 24),
            head_dim=whole_number(config, "attention_head_dim", 128),
        )
        axes = tuple(config.get("axes_dims_rope", (16, 56, 56)))
        if sum(axes) != heads.head_dim:
            raise ConfigError(
                f"axes_dims_rope {list(axes)} must add up to attention_head_dim {heads.head_dim}"
            )
        size = heads.width
        self.in_channels = whole_number(config, "in_channels", 64)
        self._build = build
        self._seen_is_finished = bool(config.get("zero_cond_t"))
        self._rope = AxialRope(axes, 10_000.0, build.device)
        self._timestep = TimestepEmbedder(build, size)
        text_size = whole_number(config, "joint_attention_dim", 3584)
        self._text_norm = RMSNorm(build, text_size, eps=EPS)
        self._text_in = linear(build, "txt_in", text_size, size)
        self._picture_in = linear(build, "img_in", self.in_channels, size)
        num_layers = whole_number(config, "num_layers", 60)
        self._blocks = [QwenImageBlock(build, size, heads) for _ in range(num_layers)]
        self._last_numbers = Modulation(build, "norm_out.linear", size, size, 2)
        patch = whole_number(config, "patch_size", 2)
        out = patch * patch * (config.get("out_channels") or self.in_channels)
        self._out = linear(build, "proj_out", size, out)

    def rotations(self, text_length: int, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Of a row's tokens. sizes: rows and columns of the patches of the picture, and then of the
        pictures to look at. A picture's centre is at 0, and text comes after all pictures."""
        positions = []
        for index, (height, width) in enumerate(sizes):
            places = grid(height, width) - torch.tensor([height - height // 2, width - width // 2])
            first = places.new_full((len(places), 1), index)
            positions.append(torch.cat((first, places), dim=1))
        start = max(max(height // 2, width // 2) for height, width in sizes)
        text = (start + torch.arange(text_length))[:, None].expand(-1, 3)
        return self._rope(torch.cat((text, *positions)))

    def __call__(self, rows: Sequence[DenoisingRow]) -> list[Tensor]:
        """As DiffusionTransformer."""
        device = self._build.device
        tokens = JointRows(
            TokenRows.of([row.text for row in rows]), TokenRows.of([row.latents for row in rows])
        )
        lengths, timesteps = self._parts(rows)
        condition = self._timestep(column([row.timestep for row in rows], device))
        of_parts = condition
        if len(lengths) != len(rows):
            of_parts = self._timestep(column(timesteps, device))
        rotations = packed([row.rotations for row in rows])
        step = JointStep.of(tokens, rotations, device)
        text = self._text_in(self._text_norm(packed([row.text for row in rows])))
        picture = self._picture_in(packed([row.latents for row in rows]))
        for block in self._blocks:
            block(text, picture, (condition, of_parts), TokenRows(lengths), step)
        split = tokens.second.split(picture)
        wanted = [own[: row.num_wanted] for own, row in zip(split, rows, strict=True)]
        own = TokenRows.of(wanted)
        scale, shift = self._last_numbers(condition)
        normed = modulated_norm(
            self._build.kernels, packed(wanted), own, shift=shift, scale=scale, eps=EPS
        )
        return list(own.split(self._out(normed)))

    def _parts(self, rows: Sequence[DenoisingRow]) -> tuple[tuple[int, ...], list[float]]:
        """Tokens and timestep of each part of the picture tokens."""
        lengths: list[int] = []
        timesteps: list[float] = []
        for row in rows:
            own = len(row.latents) if row.num_wanted is None else row.num_wanted
            seen = len(row.latents) - own if self._seen_is_finished else 0
            lengths.append(len(row.latents) - seen)
            timesteps.append(row.timestep)
            if seen:
                lengths.append(seen)
                timesteps.append(0.0)
        return tuple(lengths), timesteps

    def targets(self) -> dict[str, Target]:
        found = prefixed("time_text_embed.timestep_embedder", self._timestep.targets())
        found |= prefixed("txt_norm", self._text_norm.targets())
        for layer in (self._text_in, self._picture_in, self._last_numbers, self._out):
            found |= layer.targets()
        for index, block in enumerate(self._blocks):
            found |= prefixed(f"transformer_blocks.{index}", block.targets())
        return found

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()
