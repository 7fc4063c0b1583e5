"""The tower of Qwen2.5-VL. Source: Bai et al. 2025, arXiv:2502.13923."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import EqualTexts, group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import GatedMLP
from sapwood.layers.named_linear import linear
from sapwood.layers.norm import RMSNorm
from sapwood.layers.targets import Target, once_filled, prefixed
from sapwood.models.hf_fields import activation, integer
from sapwood.models.vision.blocks import FusedAttention
from sapwood.models.vision.grid_tower import GridTower, frame_lengths
from sapwood.models.vision.grids import Grid, rotation_table
from sapwood.models.vision.prepared import tensor_of, why_malformed
from sapwood.schema.media import Medium

_EPS = 1e-6
_THETA = 10_000.0
_STEP = "second_per_grid_ts"


class Block:
    """x + attention(norm1(x)), then y + mlp(norm2(y))."""

    def __init__(self, build: Build, size: int, num_heads: int, inner: int, act: str) -> None:
        self._norms = [RMSNorm(build, size, eps=_EPS) for _ in range(2)]
        self._attention = FusedAttention(build, size, num_heads, names=("qkv", "proj"))
        self._mlp = GatedMLP(build, size, inner, activation=Activation(act), bias=True)

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
        self._norm = RMSNorm(build, size, eps=_EPS)
        self._first = linear(build, "mlp.0", self._merged, self._merged)
        self._second = linear(build, "mlp.2", self._merged, out_size)

    def __call__(self, x: Tensor) -> Tensor:
        """x [patches, size] -> [patches / merge², out_size]"""
        x = self._norm(x).view(-1, self._merged)
        return self._second(F.gelu(self._first(x)))

    def targets(self) -> dict[str, Target]:
        norm = prefixed("ln_q", self._norm.targets())
        return norm | self._first.targets() | self._second.targets()


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
        act = activation(hf, "hidden_act", default="silu")
        inner = integer(hf, "intermediate_size", default=3420)
        self._blocks = [
            Block(build, size, num_heads, inner, act)
            for _ in range(integer(hf, "depth", default=32))
        ]
        self._merger = Merger(build, size, merge**2, out_size)

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
        found = prefixed("merger", self._merger.targets())
        for index, block in enumerate(self._blocks):
            found |= prefixed(f"blocks.{index}", block.targets())
        return found


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
