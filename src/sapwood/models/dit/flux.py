"""Flux.1's transformer: dev, schnell, Kontext and Fill. Source: Black Forest Labs 2024, FLUX.1's
model code; Labs et al. 2025, arXiv:2506.15742 (Kontext)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.layers.adaptive import Modulation, add_gated, modulated_norm
from sapwood.layers.axial_rope import AxialRope
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


class DoubleBlock:
    """Text and picture with weights of their own."""

    def __init__(self, build: Build, size: int, heads: HeadSizes) -> None:
        self._build = build
        self._picture_numbers = Modulation(build, "norm1.linear", size, size, 6)
        self._text_numbers = Modulation(build, "norm1_context.linear", size, size, 6)
        self._attention = JointAttention(build, size, heads)
        self._mlp = GeluMLP(build, size)
        self._text_mlp = GeluMLP(build, size)

    def __call__(self, text: Tensor, picture: Tensor, condition: Tensor, step: JointStep) -> None:
        """text [T1, size] and picture [T2, size] are changed in place; condition [R, size]"""
        kernels, rows = self._build.kernels, step.rows
        numbers = self._picture_numbers(condition)
        of_text = self._text_numbers(condition)
        normed = [
            modulated_norm(kernels, x, own, shift=of[0], scale=of[1], eps=EPS)
            for x, own, of in ((text, rows.first, of_text), (picture, rows.second, numbers))
        ]
        text_mixed, mixed = self._attention(normed[0], normed[1], step)
        add_gated(picture, numbers[2], mixed, rows.second)
        add_gated(text, of_text[2], text_mixed, rows.first)
        feed_forward(self._build, self._mlp, picture, rows.second, numbers[3:])
        feed_forward(self._build, self._text_mlp, text, rows.first, of_text[3:])

    def targets(self) -> dict[str, Target]:
        return {
            **self._picture_numbers.targets(),
            **self._text_numbers.targets(),
            **prefixed("attn", self._attention.targets()),
            **prefixed("ff", self._mlp.targets()),
            **prefixed("ff_context", self._text_mlp.targets()),
        }


class SingleBlock:
    """All tokens with the same weights; attention and the feed-forward layer work side by side."""

    def __init__(self, build: Build, size: int, heads: HeadSizes) -> None:
        self._kernels = build.kernels
        self._scale = heads.head_dim**-0.5
        self._numbers = Modulation(build, "norm.linear", size, size, 3)
        self._projections = Projections(
            build,
            size,
            heads,
            names=("attn.to_q", "attn.to_k", "attn.to_v"),
            norms=("attn.norm_q", "attn.norm_k"),
            beside={"proj_mlp": 4 * size},
        )
        self._out = linear(build, "proj_out", 5 * size, size)

    def __call__(self, x: Tensor, rows: TokenRows, condition: Tensor, step: JointStep) -> None:
        """x [T, size], changed in place; condition [R, size]"""
        shift, scale, gate = self._numbers(condition)
        normed = modulated_norm(self._kernels, x, rows, shift=shift, scale=scale, eps=EPS)
        q, k, v, (up,) = self._projections(normed, step.rotations)
        mixed = self._kernels.bidirectional_attention(q, k, v, step.groups, self._scale)
        activated = self._kernels.activate(up.contiguous(), Activation.GELU_TANH)
        add_gated(x, gate, self._out(torch.cat((mixed.flatten(1), activated), dim=-1)), rows)

    def targets(self) -> dict[str, Target]:
        return self._numbers.targets() | self._projections.targets() | self._out.targets()


class FluxTransformer:
    """Rows of text and picture tokens to the velocity of each picture token."""

    def __init__(self, config: Mapping[str, Any], build: Build) -> None:
        """config: config.json of the component"""
        if config.get("patch_size", 1) != 1:
            raise ConfigError(f"Flux's patch_size must be 1, got {config['patch_size']!r}")
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
        self.out_channels = config.get("out_channels") or self.in_channels
        self.has_guidance = bool(config.get("guidance_embeds", False))
        self._build = build
        self._rope = AxialRope(axes, 10_000.0, build.device)
        self._timestep = TimestepEmbedder(build, size)
        self._guidance = TimestepEmbedder(build, size) if self.has_guidance else None
        pooled = whole_number(config, "pooled_projection_dim", 768)
        self._pooled = EmbeddingMLP(build, pooled, size)
        text_size = whole_number(config, "joint_attention_dim", 4096)
        self._text_in = linear(build, "context_embedder", text_size, size)
        self._picture_in = linear(build, "x_embedder", self.in_channels, size)
        doubles = whole_number(config, "num_layers", 19)
        singles = whole_number(config, "num_single_layers", 38)
        self._doubles = [DoubleBlock(build, size, heads) for _ in range(doubles)]
        self._singles = [SingleBlock(build, size, heads) for _ in range(singles)]
        self._last_numbers = Modulation(build, "norm_out.linear", size, size, 2)
        self._out = linear(build, "proj_out", size, self.out_channels)

    def rotations(self, text_length: int, positions: Tensor) -> Tensor:
        """Of a row's tokens: text has position 0 on all axes; positions [S, 3] of the patches."""
        text = positions.new_zeros(text_length, positions.shape[1])
        return self._rope(torch.cat((text, positions)))

    def __call__(self, rows: Sequence[DenoisingRow]) -> list[Tensor]:
        """As DiffusionTransformer."""
        condition = self._condition(rows)
        tokens = JointRows(
            TokenRows.of([row.text for row in rows]), TokenRows.of([row.latents for row in rows])
        )
        rotations = packed([row.rotations for row in rows])
        step = JointStep.of(tokens, rotations, self._build.device)
        text = self._text_in(packed([row.text for row in rows]))
        picture = self._picture_in(packed([row.latents for row in rows]))
        for double in self._doubles:
            double(text, picture, condition, step)
        joint = tokens.join(text, picture)
        for single in self._singles:
            single(joint, tokens.joint, condition, step)
        wanted = [
            x[len(row.text) :][: row.num_wanted]
            for x, row in zip(tokens.joint.split(joint), rows, strict=True)
        ]
        scale, shift = self._last_numbers(condition)
        own = TokenRows.of(wanted)
        normed = modulated_norm(
            self._build.kernels, packed(wanted), own, shift=shift, scale=scale, eps=EPS
        )
        return list(own.split(self._out(normed)))

    def _condition(self, rows: Sequence[DenoisingRow]) -> Tensor:
        """[R, size]"""
        device = self._build.device
        found = self._timestep(column([row.timestep for row in rows], device))
        if self._guidance is not None:
            strengths = [row.guidance for row in rows if row.guidance is not None]
            assert len(strengths) == len(rows), "this transformer wants every row's guidance"
            found = found + self._guidance(column(strengths, device) * 1000.0)
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return found + self._pooled(torch.stack(pooled))

    def targets(self) -> dict[str, Target]:
        found = prefixed("time_text_embed.timestep_embedder", self._timestep.targets())
        found |= prefixed("time_text_embed.text_embedder", self._pooled.targets())
        if self._guidance is not None:
            found |= prefixed("time_text_embed.guidance_embedder", self._guidance.targets())
        for layer in (self._text_in, self._picture_in, self._last_numbers, self._out):
            found |= layer.targets()
        for index, double in enumerate(self._doubles):
            found |= prefixed(f"transformer_blocks.{index}", double.targets())
        for index, single in enumerate(self._singles):
            found |= prefixed(f"single_transformer_blocks.{index}", single.targets())
        return found

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()
