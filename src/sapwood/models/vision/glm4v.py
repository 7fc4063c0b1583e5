"""Towers of GLM-4.1V, GLM-4.5V, GLM-4.6V and GLM-OCR.

Source: GLM-V Team 2025, arXiv:2507.01006; Z.ai 2026, GLM-OCR's model code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isqrt
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import GatedMLP
from sapwood.layers.named_linear import linear
from sapwood.layers.norm import LayerNorm, RMSNorm
from sapwood.layers.targets import Target, once_filled, prefixed, whole
from sapwood.models.hf_fields import activation, epsilon, integer, switch
from sapwood.models.vision.blocks import PatchNorm, numbered
from sapwood.models.vision.grid_tower import GridBlock, GridTower, frame_lengths
from sapwood.models.vision.grids import Grid, block_places, rotation_table

_THETA = 10_000.0


class GlmMerger:
    """mlp(gelu(norm(proj(x)))), between vectors of the decoder's size."""

    def __init__(self, build: Build, size: int, inner: int, act: Activation) -> None:
        self._proj = linear(build, "proj", size, size, bias=False)
        self._norm = LayerNorm(build, size, eps=1e-5)
        self._mlp = GatedMLP(build, size, inner, activation=act)
        self._kernels = build.kernels

    def __call__(self, x: Tensor) -> Tensor:
        """x [tokens, size] -> the same shape"""
        return self._mlp(self._kernels.activate(self._norm(self._proj(x)), Activation.GELU))

    def targets(self) -> dict[str, Target]:
        found = self._proj.targets() | once_filled(self._mlp.targets(), self._mlp.pack)
        return found | prefixed("post_projection_norm", self._norm.targets())


class GlmOcrTower(GridTower):
    """Whole attention within a frame; blocks of patches become one vector by a convolution."""

    sections: ClassVar = (8, 12, 12)
    norms_heads = True

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = hf_config["vision_config"]
        size, out_size = integer(hf, "hidden_size"), integer(hf, "out_hidden_size")
        super().__init__(hf_config, build, size=size, vector_size=out_size, has_bias=True)
        num_heads = integer(hf, "num_heads", default=12)
        self._head_dim = size // num_heads
        act = Activation(activation(hf, "hidden_act", default="silu"))
        self._eps = epsilon(hf, "rms_norm_eps", default=1e-5)
        norm = partial(RMSNorm, build, size, eps=self._eps)
        bias = switch(hf, "attention_bias")
        layers = integer(hf, "depth", default=24)
        inner, merger_inner = self._inner_sizes(hf, out_size)

        def block() -> GridBlock:
            mlp = GatedMLP(build, size, inner, activation=act, bias=bias and self.norms_heads)
            norms = self._head_norms(build)
            out_bias = bias and self.norms_heads
            return GridBlock(
                build, size, num_heads, mlp, norm=norm, bias=bias, out_bias=out_bias, norms=norms
            )

        self._blocks = [block() for _ in range(layers)]
        self._last_norm = norm()
        merge = self._form.merge
        self._join = build.empty(out_size, size, merge, merge)
        self._join_bias = build.empty(out_size)
        self._merger = GlmMerger(build, out_size, merger_inner, act)
        self._build_places(hf, build, size)

    def _head_norms(self, build: Build) -> list[tuple[str, PatchNorm]]:
        norm = partial(RMSNorm, build, self._head_dim, eps=self._eps)
        return [(name, norm()) for name in ("q_norm", "k_norm")]

    def _inner_sizes(self, hf: Mapping[str, Any], out_size: int) -> tuple[int, int]:
        """Of a layer's mlp, and of the merger's."""
        channels = integer(hf, "in_channels", default=3)
        return integer(hf, "intermediate_size", default=4096), out_size * channels

    def _build_places(self, hf: Mapping[str, Any], build: Build, size: int) -> None:
        """There are no learned positions."""

    def _placed(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        return x

    def _encoded(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        merge = self._form.merge
        x = self._placed(x, grids)
        table = rotation_table(grids, merge, self._head_dim, _THETA).to(x.device)
        frames = group_texts(frame_lengths(grids), x.device)
        for block in self._blocks:
            x = block(x, frames, table)
        x = self._last_norm(x).view(-1, merge**2, x.shape[1])
        x = x.transpose(1, 2).flatten(1)
        return self._merger(F.linear(x, self._join.flatten(1), self._join_bias))

    def _own_targets(self) -> dict[str, Target]:
        return {
            **prefixed("merger", self._merger.targets()),
            **prefixed("post_layernorm", self._last_norm.targets()),
            "downsample.weight": whole(self._join),
            "downsample.bias": whole(self._join_bias),
            **numbered("blocks", self._blocks),
        }


class Glm4VTower(GlmOcrTower):
    """With learned positions, between which those of a picture's size lie."""

    norms_heads = False

    def _head_norms(self, build: Build) -> list[tuple[str, PatchNorm]]:
        return []

    def _inner_sizes(self, hf: Mapping[str, Any], out_size: int) -> tuple[int, int]:
        return out_size, integer(hf, "intermediate_size", default=13_696)

    def _build_places(self, hf: Mapping[str, Any], build: Build, size: int) -> None:
        side = integer(hf, "image_size", default=336) // integer(hf, "patch_size", default=14)
        self._places = build.empty(side**2, size)
        self._first_norm = RMSNorm(build, size, eps=self._eps)

    def _placed(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        side = isqrt(len(self._places))
        table = self._places.float().view(1, side, side, -1).permute(0, 3, 1, 2)
        found = []
        for grid in grids:
            row, column = block_places(grid, self._form.merge)
            at = torch.stack(((column + 0.5) / grid.width, (row + 0.5) / grid.height), dim=-1)
            where = (at * 2 - 1)[None, :, None].to(table.device)
            own = F.grid_sample(
                table, where, mode="bicubic", align_corners=False, padding_mode="border"
            )
            found.append(own[0, :, :, 0].T.repeat(grid.frames, 1))
        return self._first_norm(x) + torch.cat(found).to(x.dtype)

    def _own_targets(self) -> dict[str, Target]:
        return super()._own_targets() | {
            "embeddings.position_embedding.weight": whole(self._places),
            **prefixed("post_conv_layernorm", self._first_norm.targets()),
        }
