"""The tower of Idefics3 and SmolVLM: SigLIP's, whose patches are put together by blocks.

Source: Laurençon et al. 2024, arXiv:2408.12637; Marafioti et al. 2025, arXiv:2504.05299."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from sapwood.layers.build import Build
from sapwood.layers.named_linear import linear
from sapwood.layers.targets import Target, prefixed
from sapwood.models.hf_fields import integer
from sapwood.models.vision.tiles import blocks_of
from sapwood.models.vision.tower import TileTower
from sapwood.models.vision.vit import ViT
from sapwood.schema.media import MediaTensor, Medium

_MASK = "pixel_attention_mask"


class Idefics3Tower(TileTower):
    """A picture is a row of tiles of one size; `scale` x `scale` patches become one vector."""

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = {"hidden_act": "gelu_pytorch_tanh", **hf_config["vision_config"]}
        depth = integer(hf, "num_hidden_layers", default=12)
        self._vit = ViT(build, hf, num_layers=depth, has_class=False, has_last_norm=True)
        self.form = self._vit.form
        self._scale = integer(hf_config, "scale_factor", default=2)
        self.tokens_per_tile = (self._vit.side // self._scale) ** 2
        self.vector_size = integer(hf_config["text_config"], "hidden_size")
        width = self._vit.size * self._scale**2
        self._proj = linear(build, "proj", width, self.vector_size, bias=False)

    def why_unfit(self, medium: Medium) -> str | None:
        mask = medium.tensors.get(_MASK)
        if mask is not None and not _shows_all(mask):
            return f"{_MASK} hides a part of a prepared image; send tiles without padding"
        return super().why_unfit(medium)

    def vectors(self, media: Sequence[Medium]) -> Tensor:
        return self._proj(blocks_of(self._vit(media), self._scale))

    def targets(self) -> dict[str, Target]:
        return {
            **prefixed("vision_model", self._vit.targets()),
            **prefixed("connector.modality_projection", self._proj.targets()),
        }


def _shows_all(mask: MediaTensor) -> bool:
    if mask.dtype not in ("int64", "int32", "uint8", "bool"):
        return False
    size = np.dtype(mask.dtype).itemsize
    return len(mask.data) % size == 0 and bool(np.frombuffer(mask.data, mask.dtype).all())
