"""The tower of Qwen3-VL. Source: Qwen team 2025, arXiv:2511.21631."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import EqualTexts, group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.named_linear import linear
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, once_filled, prefixed, whole
from sapwood.models.hf_fields import activation, integer
from sapwood.models.vision.blocks import FusedAttention
from sapwood.models.vision.grid_tower import GridTower, frame_lengths
from sapwood.models.vision.grids import Grid, block_places, rotation_table

_EPS = 1e-6
_THETA = 10_000.0


class Block:
    """x + attention(norm1(x)), then y + mlp(norm2(y))."""

    def __init__(self, build: Build, size: int, num_heads: int, inner: int, act: str) -> None:
        self._norms = [LayerNorm(build, size, eps=_EPS) for _ in range(2)]
        self._attention = FusedAttention(build, size, num_heads, names=("qkv", "proj"))
        names = ("linear_fc1", "linear_fc2")
        self._mlp = PlainMLP(build, size, inner, activation=Activation(act), bias=True, names=names)

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

    def __init__(
        self, build: Build, size: int, merged: int, out_size: int, *, norms_blocks: bool
    ) -> None:
        """norms_blocks: whether the norm is over a whole block; else over each patch"""
        self._merged = merged * size
        self._norms_blocks = norms_blocks
        self._norm = LayerNorm(build, self._merged if norms_blocks else size, eps=_EPS)
        self._first = linear(build, "linear_fc1", self._merged, self._merged)
        self._second = linear(build, "linear_fc2", self._merged, out_size)

    def __call__(self, x: Tensor) -> Tensor:
        """x [patches, size] -> [patches / merge², out_size]"""
        if self._norms_blocks:
            x = self._norm(x.view(-1, self._merged))
        else:
            x = self._norm(x).view(-1, self._merged)
        return self._second(F.gelu(self._first(x)))

    def targets(self) -> dict[str, Target]:
        norm = prefixed("norm", self._norm.targets())
        return norm | self._first.targets() | self._second.targets()


class Qwen3VLTower(GridTower):
    """States of some layers become vectors too, which the decoder adds after its first layers
    (DeepStack, Meng et al. 2024, arXiv:2406.04334)."""

    stacked_by_default: ClassVar[Sequence[int]] = (8, 16, 24)

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = hf_config["vision_config"]
        size, out_size = integer(hf, "hidden_size"), integer(hf, "out_hidden_size")
        told = hf.get("deepstack_visual_indexes")
        self._stacked = list(self.stacked_by_default if told is None else told)
        super().__init__(
            hf_config,
            build,
            size=size,
            vector_size=out_size * (1 + len(self._stacked)),
            has_bias=True,
        )
        num_heads = integer(hf, "num_heads", default=16)
        self._head_dim = size // num_heads
        num_places = integer(hf, "num_position_embeddings", default=2304)
        self._side = isqrt(num_places)
        self._places = build.empty(num_places, size)
        act = activation(hf, "hidden_act", default="gelu_pytorch_tanh")
        inner = integer(hf, "intermediate_size", default=4304)
        self._blocks = [
            Block(build, size, num_heads, inner, act)
            for _ in range(integer(hf, "depth", default=27))
        ]
        merged = self._form.merge**2
        self._merger = Merger(build, size, merged, out_size, norms_blocks=False)
        self._stack_mergers = [
            Merger(build, size, merged, out_size, norms_blocks=True) for _ in self._stacked
        ]

    def _encoded(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        merge = self._form.merge
        x = x + torch.cat([self._places_of(grid) for grid in grids])
        table = rotation_table(grids, merge, self._head_dim, _THETA).to(x.device)
        frames = group_texts(frame_lengths(grids), x.device)
        later: list[Tensor] = []
        for index, block in enumerate(self._blocks):
            x = block(x, frames, table)
            if index in self._stacked:
                later.append(self._stack_mergers[self._stacked.index(index)](x))
        return torch.cat((self._merger(x), *later), dim=1)

    def _places_of(self, grid: Grid) -> Tensor:
        """Learned positions between which those of that grid lie: [patches, size]"""
        row, column = block_places(grid, self._form.merge)
        rows, row_weights = self._between(row, grid.height)
        columns, column_weights = self._between(column, grid.width)
        index = rows[:, :, None] * self._side + columns[:, None]
        weight = row_weights[:, :, None] * column_weights[:, None]
        index, weight = (one.flatten(1).to(self._places.device) for one in (index, weight))
        found = (self._places[index] * weight[..., None].to(self._places.dtype)).sum(1)
        return found.repeat(grid.frames, 1)

    def _between(self, at: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """(the two learned places next to each, their weights) of an axis: [patches, 2] each"""
        place = at.float() * (self._side - 1) / max(size - 1, 1)
        low = place.floor()
        share = place - low
        pair = low.long()[:, None] + torch.arange(2)
        return pair.clamp(max=self._side - 1), torch.stack((1 - share, share), dim=1)

    def _own_targets(self) -> dict[str, Target]:
        found = {"pos_embed.weight": whole(self._places)}
        found |= prefixed("merger", self._merger.targets())
        for index, merger in enumerate(self._stack_mergers):
            found |= prefixed(f"deepstack_merger_list.{index}", merger.targets())
        for index, block in enumerate(self._blocks):
            found |= prefixed(f"blocks.{index}", block.targets())
        return found


class Qwen35Tower(Qwen3VLTower):
    """Qwen3.5's: the same without vectors for later layers."""

    stacked_by_default: ClassVar[Sequence[int]] = ()
