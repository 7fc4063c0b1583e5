"""The tower of Qwen2.5-VL. Source: Bai et al. 2025, arXiv:2502.13923."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import GatedMLP
from sapwood.layers.norm import RMSNorm
from sapwood.layers.targets import Target, prefixed
from sapwood.models.hf_fields import activation, integer
from sapwood.models.vision.blocks import numbered
from sapwood.models.vision.grid_tower import GridBlock, GridTower, Merger, frame_lengths
from sapwood.models.vision.grids import Grid, rotation_table
from sapwood.models.vision.prepared import tensor_of, why_malformed
from sapwood.schema.media import Medium

_EPS = 1e-6
_THETA = 10_000.0
_STEP = "second_per_grid_ts"


class Qwen25VLTower(GridTower):
    """Most layers attend within windows of a frame; patches lie window by window."""

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = hf_config["vision_config"]
        size, out_size = integer(hf, "hidden_size"), integer(hf, "out_hidden_size")
        super().__init__(hf_config, build, size=size, vector_size=out_size)
        num_heads = integer(hf, "num_heads", default=16)
        self._head_dim = size // num_heads
        self._tokens_per_second = integer(hf, "tokens_per_second", default=4)
        merge, patch = self._form.merge, integer(hf, "patch_size", default=14)
        self._window = integer(hf, "window_size", default=112) // merge // patch
        self._whole = frozenset(hf.get("fullatt_block_indexes") or (7, 15, 23, 31))
        act = Activation(activation(hf, "hidden_act", default="silu"))
        inner = integer(hf, "intermediate_size", default=3420)
        norm = partial(RMSNorm, build, size, eps=_EPS)

        def mlp() -> GatedMLP:
            return GatedMLP(build, size, inner, activation=act, bias=True)

        kv_heads = hf.get("num_key_value_heads")
        self._blocks = [
            GridBlock(build, size, num_heads, mlp(), norm=norm, num_kv_heads=kv_heads)
            for _ in range(integer(hf, "depth", default=32))
        ]
        self._merger = Merger(build, size, merge**2, out_size, norm=("ln_q", norm()))

    def why_unfit(self, medium: Medium) -> str | None:
        wrong = super().why_unfit(medium)
        if wrong is None and _STEP in medium.tensors:
            wrong = why_malformed(medium, {_STEP: False})
            if wrong is None and not 0 <= float(tensor_of(medium, _STEP).flatten()[0]) < 1e4:
                wrong = f"{_STEP} of a prepared video must be seconds from 0 to 10,000"
        return wrong

    def _frame_step(self, medium: Medium) -> float:
        if medium.kind == "image":
            return 1.0
        seconds = float(tensor_of(medium, _STEP).flatten()[0]) if _STEP in medium.tensors else 1.0
        return self._tokens_per_second * seconds

    def _encoded(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        merge = self._form.merge
        order, lengths = window_order(grids, merge, self._window)
        there = order.to(x.device)
        table = rotation_table(grids, merge, self._head_dim, _THETA).to(x.device)
        x, table = (_by_blocks(one, there, merge**2) for one in (x, table))
        frames = group_texts(frame_lengths(grids), x.device)
        windows = group_texts(lengths, x.device)
        for index, block in enumerate(self._blocks):
            x = block(x, frames if index in self._whole else windows, table)
        return self._merger(x)[there.argsort()]

    def _own_targets(self) -> dict[str, Target]:
        return prefixed("merger", self._merger.targets()) | numbered("blocks", self._blocks)


def window_order(grids: Sequence[Grid], merge: int, side: int) -> tuple[Tensor, list[int]]:
    """(blocks of all frames, window by window, [blocks] int64; patches of each window)

    side  of a window, in blocks"""
    order: list[Tensor] = []
    lengths: list[int] = []
    first = 0
    for grid in grids:
        height, width = grid.height // merge, grid.width // merge
        for _ in range(grid.frames):
            frame = np.arange(first, first + height * width).reshape(height, width)
            first += height * width
            for top in range(0, height, side):
                for left in range(0, width, side):
                    window = frame[top : top + side, left : left + side].ravel()
                    order.append(torch.from_numpy(window))
                    lengths.append(len(window) * merge**2)
    return torch.cat(order), lengths


def _by_blocks(x: Tensor, order: Tensor, size: int) -> Tensor:
    """x [patches, ...] with its blocks of `size` patches in that order"""
    return x.view(-1, size, x.shape[1])[order].flatten(0, 1)


class Exaone45Tower(Qwen25VLTower):
    """EXAONE 4.5's: fewer heads of keys and values; a token has one position."""

    has_axes = False
