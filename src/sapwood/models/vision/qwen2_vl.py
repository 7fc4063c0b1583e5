"""The tower of Qwen2-VL. Source: Wang et al. 2024, arXiv:2409.12191."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import EqualTexts, group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.named_linear import linear
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, once_filled, prefixed
from sapwood.models.hf_fields import activation, integer
from sapwood.models.vision.blocks import FusedAttention
from sapwood.models.vision.grid_tower import GridTower, frame_lengths
from sapwood.models.vision.grids import Grid, rotation_table

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


class Qwen2VLTower(GridTower):
    """Patches of two frames each, whole attention within a frame, rotated by row and column."""

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = hf_config["vision_config"]
        size, out_size = integer(hf, "embed_dim"), integer(hf, "hidden_size")
        super().__init__(hf_config, build, size=size, vector_size=out_size)
        num_heads = integer(hf, "num_heads", default=16)
        self._head_dim = size // num_heads
        act = activation(hf, "hidden_act", default="quick_gelu")
        inner = size * integer(hf, "mlp_ratio", default=4)
        self._blocks = [
            Block(build, size, num_heads, inner, act) for _ in range(integer(hf, "depth"))
        ]
        self._merger = Merger(build, size, self._form.merge**2, out_size)

    def _encoded(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        table = rotation_table(grids, self._form.merge, self._head_dim, _THETA).to(x.device)
        frames = group_texts(frame_lengths(grids), x.device)
        for block in self._blocks:
            x = block(x, frames, table)
        return self._merger(x)

    def _own_targets(self) -> dict[str, Target]:
        found = prefixed("merger", self._merger.targets())
        for index, block in enumerate(self._blocks):
            found |= prefixed(f"blocks.{index}", block.targets())
        return found
