"""Towers of Gemma 3 and PaliGemma: SigLIP's. The decoder's tokens of a picture see one another.

Source: Gemma Team 2025, arXiv:2503.19786; Beyer et al. 2024, arXiv:2407.07726."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sapwood.layers.build import Build
from sapwood.layers.norm import RMSNorm
from sapwood.layers.targets import Target, prefixed, whole
from sapwood.models.hf_fields import epsilon, integer
from sapwood.models.vision.tower import TileTower
from sapwood.models.vision.vit import ViT
from sapwood.schema.media import Medium


def _siglip(hf_config: Mapping[str, Any], build: Build) -> ViT:
    hf = {"hidden_act": "gelu_pytorch_tanh", **hf_config["vision_config"]}
    depth = integer(hf, "num_hidden_layers", default=12)
    return ViT(build, hf, num_layers=depth, has_class=False, has_last_norm=True)


class Gemma3Tower(TileTower):
    """Means of neighbouring states, normed, and one linear layer."""

    attends_both_ways = True

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        self._vit = _siglip(hf_config, build)
        self.form = self._vit.form
        self.tokens_per_tile = integer(hf_config, "mm_tokens_per_image", default=256)
        self._step = self._vit.side // isqrt(self.tokens_per_tile)
        self.vector_size = integer(hf_config["text_config"], "hidden_size", default=2304)
        eps = epsilon(hf_config["vision_config"], "layer_norm_eps", default=1e-6)
        self._norm = RMSNorm(build, self._vit.size, eps=eps, adds_one=True)
        self._proj = build.empty(self._vit.size, self.vector_size)

    def vectors(self, media: Sequence[Medium]) -> Tensor:
        x = self._vit(media).transpose(1, 2)
        side = self._vit.side
        x = F.avg_pool2d(x.reshape(len(x), -1, side, side), self._step)
        return self._norm(x.flatten(2).transpose(1, 2).flatten(0, 1).contiguous()) @ self._proj

    def targets(self) -> dict[str, Target]:
        projector = {"mm_input_projection_weight": whole(self._proj)}
        projector |= prefixed("mm_soft_emb_norm", self._norm.targets())
        return prefixed("vision_tower", self._vit.targets()) | prefixed(
            "multi_modal_projector", projector
        )

    def checkpoint_name(self, name: str) -> str:
        own = name.removeprefix("model.")
        return own.replace("vision_tower.vision_model.", "vision_tower.", 1)
