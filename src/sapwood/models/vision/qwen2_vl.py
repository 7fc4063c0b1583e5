"""The tower of Qwen2-VL. Source: Wang et al. 2024, arXiv:2409.12191."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, prefixed
from sapwood.models.hf_fields import activation, integer
from sapwood.models.vision.blocks import numbered
from sapwood.models.vision.grid_tower import GridBlock, GridTower, Merger, frame_lengths
from sapwood.models.vision.grids import Grid, rotation_table

_EPS = 1e-6
_THETA = 10_000.0


class Qwen2VLTower(GridTower):
    """Patches of two frames each, whole attention within a frame, rotated by row and column."""

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = hf_config["vision_config"]
        size, out_size = integer(hf, "embed_dim"), integer(hf, "hidden_size")
        super().__init__(hf_config, build, size=size, vector_size=out_size)
        num_heads = integer(hf, "num_heads", default=16)
        self._head_dim = size // num_heads
        act = Activation(activation(hf, "hidden_act", default="quick_gelu"))
        inner = size * integer(hf, "mlp_ratio", default=4)
        norm = partial(LayerNorm, build, size, eps=_EPS)

        def mlp() -> PlainMLP:
            return PlainMLP(build, size, inner, activation=act, bias=True, names=("fc1", "fc2"))

        self._blocks = [
            GridBlock(build, size, num_heads, mlp(), norm=norm) for _ in range(integer(hf, "depth"))
        ]
        merged = self._form.merge**2
        self._merger = Merger(build, size, merged, out_size, norm=("ln_q", norm()))

    def _encoded(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        table = rotation_table(grids, self._form.merge, self._head_dim, _THETA).to(x.device)
        frames = group_texts(frame_lengths(grids), x.device)
        for block in self._blocks:
            x = block(x, frames, table)
        return self._merger(x)

    def _own_targets(self) -> dict[str, Target]:
        return prefixed("merger", self._merger.targets()) | numbered("blocks", self._blocks)
