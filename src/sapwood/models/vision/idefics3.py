"""The tower of Idefics3 and SmolVLM: SigLIP's, whose patches are put together by blocks.

Source: Laurençon et al. 2024, arXiv:2408.12637; Marafioti et al. 2025, arXiv:2504.05299."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sapwood.layers.build import Build
from sapwood.layers.named_linear import linear
from sapwood.layers.targets import Target, prefixed
from sapwood.models.hf_fields import integer
from sapwood.models.vision.vit import ViT
from sapwood.schema.media import MediaTensor, Medium

_MASK = "pixel_attention_mask"


class Idefics3Tower:
    """A picture is a row of tiles of one size; `scale` x `scale` patches become one vector."""

    vector_size: int

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = {"hidden_act": "gelu_pytorch_tanh", **hf_config["vision_config"]}
        depth = integer(hf, "num_hidden_layers", default=12)
        self._vit = ViT(build, hf, num_layers=depth, has_class=False, has_last_norm=True)
        self._scale = integer(hf_config, "scale_factor", default=2)
        self.vector_size = integer(hf_config["text_config"], "hidden_size")
        width = self._vit.size * self._scale**2
        self._proj = linear(build, "proj", width, self.vector_size, bias=False)

    @property
    def axis_of_pair(self) -> Tensor | None:
        return None

    def why_unfit(self, medium: Medium) -> str | None:
        mask = medium.tensors.get(_MASK)
        if mask is not None and not _shows_all(mask):
            return f"{_MASK} hides a part of a prepared image; send tiles without padding"
        return self._vit.why_unfit(medium, (self._vit.side // self._scale) ** 2)

    def num_patches(self, medium: Medium) -> int:
        return self._vit.num_patches(medium)

    def encode(self, media: Sequence[Medium]) -> list[Tensor]:
        x = self._proj(self._put_together(self._vit(media)))
        return list(x.split_with_sizes([medium.num_tokens for medium in media]))

    def _put_together(self, x: Tensor) -> Tensor:
        """x [tiles, side², size] -> [tokens of all tiles, scale² * size]"""
        blocks, scale = self._vit.side // self._scale, self._scale
        x = x.view(len(x), blocks, scale, blocks, scale, self._vit.size)
        return x.transpose(2, 3).reshape(len(x) * blocks**2, -1)

    def positions(self, num_tokens: int, media: Sequence[Medium]) -> NDArray[np.int64] | None:
        return None

    def targets(self) -> dict[str, Target]:
        return {
            **prefixed("vision_model", self._vit.targets()),
            **prefixed("connector.modality_projection", self._proj.targets()),
        }

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()

    def checkpoint_name(self, name: str) -> str:
        return name.removeprefix("model.")

    def finalize(self) -> None:
        """Each layer is packed once it is filled."""


def _shows_all(mask: MediaTensor) -> bool:
    if mask.dtype not in ("int64", "int32", "uint8", "bool"):
        return False
    size = np.dtype(mask.dtype).itemsize
    return len(mask.data) % size == 0 and bool(np.frombuffer(mask.data, mask.dtype).all())
