"""Flux.2's transformer. Source: Black Forest Labs 2025, FLUX.2's model code.

As Flux.1's, but all blocks of a kind share their numbers of a timestep, and no layer has a bias."""

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
from sapwood.layers.mlp import GatedMLP
from sapwood.layers.named_linear import linear
from sapwood.layers.norm import RMSNorm
from sapwood.layers.targets import Target, once_filled, prefixed
from sapwood.layers.timesteps import TimestepEmbedder
from sapwood.layers.token_rows import JointRows, TokenRows, packed
from sapwood.models.dit.joint import HeadSizes, JointAttention, JointStep, whole_number
from sapwood.models.dit.rows import DenoisingRow, column

Numbers = tuple[Tensor, ...]


class DoubleBlock:
    """Text and picture with weights of their own."""

    def __init__(self, build: Build, heads: HeadSizes, inner: int, eps: float) -> None:
        size = heads.width
        self._kernels, self._eps = build.kernels, eps
        self._attention = JointAttention(build, size, heads, bias=False)
        self._mlp, self._text_mlp = (
            GatedMLP(build, size, inner, names=("gate", "up", "linear_out"), fused="linear_in")
            for _ in range(2)
        )

    def __call__(
        self, text: Tensor, picture: Tensor, numbers: tuple[Numbers, Numbers], step: JointStep
    ) -> None:
        """text [T1, size] and picture [T2, size] are changed in place; numbers: of both, six
        each"""
        parts = ((text, step.rows.first, numbers[0]), (picture, step.rows.second, numbers[1]))
        normed = [self._normed(x, rows, own[:2]) for x, rows, own in parts]
        mixed = self._attention(normed[0], normed[1], step)
        mlps = (self._text_mlp, self._mlp)
        for (x, rows, own), attended, mlp in zip(parts, mixed, mlps, strict=True):
            add_gated(x, own[2], attended, rows)
            add_gated(x, own[5], mlp(self._normed(x, rows, own[3:5])), rows)

    def _normed(self, x: Tensor, rows: TokenRows, numbers: Numbers) -> Tensor:
        shift, scale = numbers
        return modulated_norm(self._kernels, x, rows, shift=shift, scale=scale, eps=self._eps)

    def targets(self) -> dict[str, Target]:
        found = prefixed("attn", self._attention.targets())
        for name, mlp in (("ff", self._mlp), ("ff_context", self._text_mlp)):
            found |= prefixed(name, once_filled(mlp.targets(), mlp.pack))
        return found


class SingleBlock:
    """All tokens with the same weights; attention and the feed-forward layer work side by side."""

    def __init__(self, build: Build, heads: HeadSizes, inner: int, eps: float) -> None:
        size = heads.width
        self._kernels, self._heads, self._eps = build.kernels, heads, eps
        self._in = linear(build, "attn.to_qkv_mlp_proj", size, 3 * size + 2 * inner, bias=False)
        self._norms = [RMSNorm(build, heads.head_dim, eps=eps) for _ in range(2)]
        self._out = linear(build, "attn.to_out", size + inner, size, bias=False)

    def __call__(self, x: Tensor, rows: TokenRows, numbers: Numbers, step: JointStep) -> None:
        """x [T, size], changed in place"""
        shift, scale, gate = numbers
        normed = modulated_norm(self._kernels, x, rows, shift=shift, scale=scale, eps=self._eps)
        heads, size = self._heads, self._heads.width
        all_of = self._in(normed)
        parts = torch.split(all_of[:, : 3 * size], size, dim=-1)
        q, k = (x.new_empty(len(x), heads.num_heads, heads.head_dim) for _ in range(2))
        for norm, part, out in zip(self._norms, parts[:2], (q, k), strict=True):
            self._kernels.norm_rotate_heads(part, norm.weight, norm.eps, step.rotations, out)
        v = parts[2].reshape(q.shape)
        mixed = self._kernels.bidirectional_attention(q, k, v, step.groups, heads.head_dim**-0.5)
        up = self._kernels.activate_and_mul(all_of[:, 3 * size :].contiguous(), Activation.SILU)
        add_gated(x, gate, self._out(torch.cat((mixed.flatten(1), up), dim=-1)), rows)

    def targets(self) -> dict[str, Target]:
        found = self._in.targets() | self._out.targets()
        for name, norm in zip(("attn.norm_q", "attn.norm_k"), self._norms, strict=True):
            found |= prefixed(name, norm.targets())
        return found


class Flux2Transformer:
    """Rows of text and picture tokens to the velocity of each picture token."""

    def __init__(self, config: Mapping[str, Any], build: Build) -> None:
        """config: config.json of the component"""
        if config.get("patch_size", 1) != 1:
            raise ConfigError(f"Flux.2's patch_size must be 1, got {config['patch_size']!r}")
        eps = self._eps = float(config.get("eps", 1e-6))
        heads = HeadSizes(
            num_heads=whole_number(config, "num_attention_heads", 48),
            head_dim=whole_number(config, "attention_head_dim", 128),
            norm_eps=eps,
        )
        axes = tuple(config.get("axes_dims_rope", (32, 32, 32, 32)))
        if sum(axes) != heads.head_dim:
            raise ConfigError(
                f"axes_dims_rope {list(axes)} must add up to attention_head_dim {heads.head_dim}"
            )
        size = heads.width
        inner = int(size * float(config.get("mlp_ratio", 3.0)))
        self.in_channels = whole_number(config, "in_channels", 128)
        self.has_guidance = bool(config.get("guidance_embeds", True))
        self._build = build
        self._rope = AxialRope(axes, float(config.get("rope_theta", 2000)), build.device)
        waves = whole_number(config, "timestep_guidance_channels", 256)
        self._timestep = TimestepEmbedder(build, size, frequencies=waves, bias=False)
        self._guidance: TimestepEmbedder | None = None
        if self.has_guidance:
            self._guidance = TimestepEmbedder(build, size, frequencies=waves, bias=False)
        self._numbers = {
            name: Modulation(build, f"{name}.linear", size, size, count, bias=False)
            for name, count in (
                ("double_stream_modulation_txt", 6),
                ("double_stream_modulation_img", 6),
                ("single_stream_modulation", 3),
                ("norm_out", 2),
            )
        }
        text_size = whole_number(config, "joint_attention_dim", 15360)
        self._text_in = linear(build, "context_embedder", text_size, size, bias=False)
        self._picture_in = linear(build, "x_embedder", self.in_channels, size, bias=False)
        doubles = whole_number(config, "num_layers", 8)
        singles = whole_number(config, "num_single_layers", 48)
        self._doubles = [DoubleBlock(build, heads, inner, eps) for _ in range(doubles)]
        self._singles = [SingleBlock(build, heads, inner, eps) for _ in range(singles)]
        out = config.get("out_channels") or self.in_channels
        self._out = linear(build, "proj_out", size, out, bias=False)

    def rotations(self, text_length: int, positions: Tensor) -> Tensor:
        """Of a row's tokens: a text's places are on the last axis; positions [S, 4] of patches."""
        text = positions.new_zeros(text_length, 4)
        text[:, 3] = torch.arange(text_length)
        return self._rope(torch.cat((text, positions)))

    def __call__(self, rows: Sequence[DenoisingRow]) -> list[Tensor]:
        """As DiffusionTransformer."""
        condition = self._condition(rows)
        of_text, of_picture, of_single, last = (
            numbers(condition) for numbers in self._numbers.values()
        )
        tokens = JointRows(
            TokenRows.of([row.text for row in rows]), TokenRows.of([row.latents for row in rows])
        )
        rotations = packed([row.rotations for row in rows])
        step = JointStep.of(tokens, rotations, self._build.device)
        text = self._text_in(packed([row.text for row in rows]))
        picture = self._picture_in(packed([row.latents for row in rows]))
        for double in self._doubles:
            double(text, picture, (of_text, of_picture), step)
        joint = tokens.join(text, picture)
        for single in self._singles:
            single(joint, tokens.joint, of_single, step)
        wanted = [
            x[len(row.text) :][: row.num_wanted]
            for x, row in zip(tokens.joint.split(joint), rows, strict=True)
        ]
        own = TokenRows.of(wanted)
        normed = modulated_norm(
            self._build.kernels, packed(wanted), own, shift=last[1], scale=last[0], eps=self._eps
        )
        return list(own.split(self._out(normed)))

    def _condition(self, rows: Sequence[DenoisingRow]) -> Tensor:
        """[R, size]"""
        device = self._build.device
        found = self._timestep(column([row.timestep for row in rows], device))
        if self._guidance is None:
            return found
        strengths = [row.guidance for row in rows if row.guidance is not None]
        assert len(strengths) == len(rows), "this transformer wants every row's guidance"
        return found + self._guidance(column(strengths, device) * 1000.0)

    def targets(self) -> dict[str, Target]:
        found = prefixed("time_guidance_embed.timestep_embedder", self._timestep.targets())
        if self._guidance is not None:
            found |= prefixed("time_guidance_embed.guidance_embedder", self._guidance.targets())
        for numbers in self._numbers.values():
            found |= numbers.targets()
        for layer in (self._text_in, self._picture_in, self._out):
            found |= layer.targets()
        for index, double in enumerate(self._doubles):
            found |= prefixed(f"transformer_blocks.{index}", double.targets())
        for index, single in enumerate(self._singles):
            found |= prefixed(f"single_transformer_blocks.{index}", single.targets())
        return found

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()
