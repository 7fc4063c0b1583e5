"""The tower of PaddleOCR-VL: SigLIP's for any size, rotated by row and column.

Source: PaddlePaddle 2025, arXiv:2510.14528."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from sapwood.kernels.texts import group_texts
from sapwood.layers.build import Build
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, prefixed, whole
from sapwood.models.hf_fields import epsilon, integer
from sapwood.models.vision.blocks import Projector, numbered
from sapwood.models.vision.grid_tower import GridTower, frame_lengths
from sapwood.models.vision.grids import Grid, rotation_table
from sapwood.models.vision.places import between
from sapwood.models.vision.vit import vit_block

_THETA = 10_000.0


class PaddleOcrTower(GridTower):
    """Patches come row by row; blocks of them are put together behind the layers."""

    sees_videos = False

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = {
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": hf_config["vision_config"].get("num_channels"),
            **hf_config["vision_config"],
            "temporal_patch_size": 1,
        }
        size = integer(hf, "hidden_size")
        vector_size = integer(hf_config["text_config"], "hidden_size")
        super().__init__(
            {**hf_config, "vision_config": hf},
            build,
            size=size,
            vector_size=vector_size,
            has_bias=True,
        )
        self._head_dim = size // integer(hf, "num_attention_heads")
        side = integer(hf, "image_size") // integer(hf, "patch_size")
        self._places = build.empty(side**2, size)
        eps = epsilon(hf, "layer_norm_eps", default=1e-6)
        self._blocks = [
            vit_block(build, hf, size, eps) for _ in range(integer(hf, "num_hidden_layers"))
        ]
        self._last_norm = LayerNorm(build, size, eps=eps)
        width = size * self._form.merge**2
        self._norm = LayerNorm(build, size, eps=1e-5)
        self._project = Projector(build, (width, width, vector_size))

    def _encoded(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        x = x + torch.cat([self._places_of(grid) for grid in grids])
        table = rotation_table(grids, 1, self._head_dim, _THETA).to(x.device)
        frames = group_texts(frame_lengths(grids), x.device)
        for block in self._blocks:
            x = block(x, frames, table)
        pieces = torch.split(self._norm(self._last_norm(x)), frame_lengths(grids))
        return self._project(
            torch.cat([self._joined(one, grid) for one, grid in zip(pieces, grids, strict=True)])
        )

    def _places_of(self, grid: Grid) -> Tensor:
        """[patches, size]"""
        table = self._places.view(isqrt(len(self._places)), -1, self._places.shape[1])
        return between(table, grid.height, grid.width).flatten(0, 1)

    def _joined(self, x: Tensor, grid: Grid) -> Tensor:
        """x [patches, size] -> [tokens, merge² * size]"""
        merge = self._form.merge
        x = x.view(grid.height // merge, merge, grid.width // merge, merge, -1)
        return x.transpose(1, 2).flatten(2).flatten(0, 1)

    def targets(self) -> dict[str, Target]:
        found = {
            "embeddings.patch_embedding.weight": self.patch_target(4),
            "embeddings.position_embedding.weight": whole(self._places),
            **prefixed("post_layernorm", self._last_norm.targets()),
            **numbered("encoder.layers", self._blocks),
        }
        if self._bias is not None:
            found["embeddings.patch_embedding.bias"] = whole(self._bias)
        projector = prefixed("pre_norm", self._norm.targets()) | self._project.targets()
        return prefixed("visual.vision_model", found) | prefixed("projector", projector)

    def _own_targets(self) -> dict[str, Target]:
        return {}

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ("visual.vision_model.head.*", "*packing_position_embedding*")

    def checkpoint_name(self, name: str) -> str:
        own = name.removeprefix("model.")
        if own.startswith("mlp_AR."):
            return "projector." + own.removeprefix("mlp_AR.")
        return own
