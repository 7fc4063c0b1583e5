"""The tower of Qwen2-VL. Source: Wang et al. 2024, arXiv:2409.12191."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import EqualTexts, group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.named_linear import linear
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, once_filled, prefixed, whole
from sapwood.models.hf_fields import activation, integer
from sapwood.models.vision.blocks import FusedAttention
from sapwood.models.vision.grids import (
    Grid,
    GridForm,
    axis_positions,
    grid_of,
    patches_of,
    rotation_table,
)
from sapwood.schema.media import Medium

_EPS = 1e-6
_THETA = 10_000.0


class Block:
    """x + attention(norm1(x)), then y + mlp(norm2(y))."""

    def __init__(self, build: Build, size: int, num_heads: int, inner: int, act: str) -> None:
        self._norms = [LayerNorm(build, size, eps=_EPS) for _ in range(2)]
        self._attention = FusedAttention(build, size, num_heads, names=("qkv", "proj"))
        self._mlp = PlainMLP(
            build, size, inner, activation=Activation(act), bias=True, names=("fc1", "fc2")
        )

    def __call__(self, x: Tensor, pictures: Sequence[EqualTexts], cos_sin: Tensor) -> Tensor:
        x = x + self._attention(self._norms[0](x), pictures, cos_sin)
        return x + self._mlp(self._norms[1](x))

    def targets(self) -> dict[str, Target]:
        return {
            **prefixed("norm1", self._norms[0].targets()),
            **prefixed("norm2", self._norms[1].targets()),
            **prefixed("attn", self._attention.targets()),
            **prefixed("mlp", once_filled(self._mlp.targets(), self._mlp.pack)),
        }


class Merger:
    """One vector of the decoder's size from `merge` x `merge` patches."""

    def __init__(self, build: Build, size: int, merged: int, out_size: int) -> None:
        self._merged = merged * size
        self._norm = LayerNorm(build, size, eps=_EPS)
        self._first = linear(build, "mlp.0", self._merged, self._merged)
        self._second = linear(build, "mlp.2", self._merged, out_size)

    def __call__(self, x: Tensor) -> Tensor:
        """x [patches, size] -> [patches / merge², out_size]"""
        x = self._norm(x).view(-1, self._merged)
        return self._second(F.gelu(self._first(x)))

    def targets(self) -> dict[str, Target]:
        norm = prefixed("ln_q", self._norm.targets())
        return norm | self._first.targets() | self._second.targets()


class Qwen2VLTower:
    """Patches of two frames each, whole attention within a frame, rotated by row and column."""

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = hf_config["vision_config"]
        size, out_size = integer(hf, "embed_dim"), integer(hf, "hidden_size")
        num_heads = integer(hf, "num_heads", default=16)
        self._build = build
        self._head_dim = size // num_heads
        patch = integer(hf, "patch_size", default=14)
        shape = (
            integer(hf, "in_channels", default=3),
            integer(hf, "temporal_patch_size", default=2),
            patch,
            patch,
        )
        self._patches = build.empty(size, *shape)
        merge = integer(hf, "spatial_merge_size", default=2)
        self._form = GridForm(merge=merge, patch_numbers=self._patches[0].numel())
        act = activation(hf, "hidden_act", default="quick_gelu")
        inner = size * integer(hf, "mlp_ratio", default=4)
        self._blocks = [
            Block(build, size, num_heads, inner, act) for _ in range(integer(hf, "depth"))
        ]
        self._merger = Merger(build, size, merge**2, out_size)
        self.vector_size = out_size
        self._sections = sections_of(hf_config)

    @property
    def axis_of_pair(self) -> Tensor | None:
        return torch.repeat_interleave(
            torch.arange(len(self._sections)) % 3, torch.tensor(self._sections)
        ).to(self._build.device)

    def why_unfit(self, medium: Medium) -> str | None:
        return self._form.why_unfit(medium)

    def num_patches(self, medium: Medium) -> int:
        return grid_of(medium).num_patches

    def encode(self, media: Sequence[Medium]) -> list[Tensor]:
        grids = [grid_of(medium) for medium in media]
        device = self._build.device
        x = patches_of(media).to(device, self._build.dtype)
        x = F.linear(x, self._patches.flatten(1))
        table = rotation_table(grids, self._form.merge, self._head_dim, _THETA).to(device)
        frames = group_texts(frame_lengths(grids), device)
        for block in self._blocks:
            x = block(x, frames, table)
        return list(torch.split(self._merger(x), [medium.num_tokens for medium in media]))

    def positions(self, num_tokens: int, media: Sequence[Medium]) -> NDArray[np.int64] | None:
        steps = [1.0] * len(media)
        return axis_positions(num_tokens, media, self._form.merge, frame_steps=steps)

    def targets(self) -> dict[str, Target]:
        found = {"patch_embed.proj.weight": whole(self._patches)}
        for index, block in enumerate(self._blocks):
            found |= prefixed(f"blocks.{index}", block.targets())
        return prefixed("visual", found | prefixed("merger", self._merger.targets()))

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()

    def checkpoint_name(self, name: str) -> str:
        return name.removeprefix("model.") if name.startswith("model.visual.") else name

    def finalize(self) -> None:
        """Each layer is packed once it is filled."""


def frame_lengths(grids: Sequence[Grid]) -> list[int]:
    """Patches of each frame of each medium."""
    return [grid.height * grid.width for grid in grids for _ in range(grid.frames)]


def sections_of(hf_config: Mapping[str, Any]) -> list[int]:
    """How many pairs of a head's entries each of the three positions turns, in turns."""
    text = hf_config.get("text_config") or hf_config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    sections = rope.get("mrope_section") or [16, 24, 24]
    if not isinstance(sections, list) or not all(isinstance(one, int) for one in sections):
        raise ConfigError(f"config.json must have numbers as 'mrope_section', got {sections!r}")
    return sections
