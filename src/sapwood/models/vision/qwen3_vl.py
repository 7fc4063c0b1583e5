"""The tower of Qwen3-VL. Source: Qwen team 2025, arXiv:2511.21631."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, prefixed, whole
from sapwood.models.hf_fields import activation, integer
from sapwood.models.vision.blocks import numbered
from sapwood.models.vision.grid_tower import GridBlock, GridTower, Merger, frame_lengths
from sapwood.models.vision.grids import Grid, block_places, rotation_table

_EPS = 1e-6
_THETA = 10_000.0
_LAYERS = ("linear_fc1", "linear_fc2")


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
        act = Activation(activation(hf, "hidden_act", default="gelu_pytorch_tanh"))
        inner = integer(hf, "intermediate_size", default=4304)
        norm = partial(LayerNorm, build, size, eps=_EPS)

        def mlp() -> PlainMLP:
            return PlainMLP(build, size, inner, activation=act, bias=True, names=_LAYERS)

        self._blocks = [
            GridBlock(build, size, num_heads, mlp(), norm=norm)
            for _ in range(integer(hf, "depth", default=27))
        ]
        self._merger = self._merger_of(build, size, out_size, norms_blocks=False)
        self._stack_mergers = [
            self._merger_of(build, size, out_size, norms_blocks=True) for _ in self._stacked
        ]

    def _merger_of(self, build: Build, size: int, out_size: int, *, norms_blocks: bool) -> Merger:
        merged = self._form.merge**2
        norm = LayerNorm(build, size * merged if norms_blocks else size, eps=_EPS)
        return Merger(
            build,
            size,
            merged,
            out_size,
            norm=("norm", norm),
            names=_LAYERS,
            norms_blocks=norms_blocks,
        )

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
        found |= numbered("deepstack_merger_list", self._stack_mergers)
        return found | numbered("blocks", self._blocks)


class Qwen35Tower(Qwen3VLTower):
    """Qwen3.5's: the same without vectors for later layers."""

    stacked_by_default: ClassVar[Sequence[int]] = ()
