"""The tower of LLaVA 1.5: CLIP's, or SigLIP's, and two linear layers.

Source: Liu et al. 2023, arXiv:2310.03744."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.layers.build import Build
from sapwood.layers.named_linear import linear
from sapwood.layers.targets import Target, prefixed
from sapwood.models.hf_fields import activation, integer
from sapwood.models.vision.vit import ViT
from sapwood.schema.media import Medium

_KINDS = ("clip_vision_model", "siglip_vision_model")


class LlavaTower:
    """States of a layer before the last, each made a vector of the decoder's size."""

    vector_size: int

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = hf_config["vision_config"]
        kind, layer = hf.get("model_type"), hf_config.get("vision_feature_layer", -2)
        if kind not in _KINDS:
            raise ConfigError(
                f"the tower of this LLaVA is a {kind!r}, which is not implemented there; known: "
                f"{', '.join(_KINDS)}. Serve its text part with --language-only"
            )
        depth = integer(hf, "num_hidden_layers")
        if not isinstance(layer, int) or not -depth - 1 <= layer < depth:
            raise ConfigError(
                f"config.json has vision_feature_layer {layer!r}; a layer before the last one is "
                "implemented. Serve the text part with --language-only"
            )
        count = layer if layer >= 0 else depth + 1 + layer
        has_class = kind == _KINDS[0]
        self._vit = ViT(build, hf, num_layers=count, has_class=has_class, has_last_norm=False)
        is_full = hf_config.get("vision_feature_select_strategy", "default") == "full"
        self._num_skipped = 0 if is_full else 1
        self.vector_size = integer(hf_config["text_config"], "hidden_size")
        bias = hf_config.get("multimodal_projector_bias", True)
        self._first = linear(build, "linear_1", self._vit.size, self.vector_size, bias=bias)
        self._second = linear(build, "linear_2", self.vector_size, self.vector_size, bias=bias)
        self._activation = Activation(activation(hf_config, "projector_hidden_act", default="gelu"))
        self._kernels = build.kernels

    @property
    def axis_of_pair(self) -> Tensor | None:
        return None

    @property
    def _per_tile(self) -> int:
        return self._vit.num_places - self._num_skipped

    def why_unfit(self, medium: Medium) -> str | None:
        return self._vit.why_unfit(medium, self._per_tile)

    def num_patches(self, medium: Medium) -> int:
        return self._vit.num_patches(medium)

    def encode(self, media: Sequence[Medium]) -> list[Tensor]:
        x = self._vit(media)[:, self._num_skipped :].flatten(0, 1)
        x = self._kernels.activate(self._first(x), self._activation)
        return list(self._second(x).split_with_sizes([one.num_tokens for one in media]))

    def positions(self, num_tokens: int, media: Sequence[Medium]) -> NDArray[np.int64] | None:
        return None

    def targets(self) -> dict[str, Target]:
        return {
            **prefixed("vision_tower", self._vit.targets()),
            **prefixed("multi_modal_projector", self._first.targets() | self._second.targets()),
        }

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()

    def checkpoint_name(self, name: str) -> str:
        own = name.removeprefix("model.")
        return own.replace("vision_tower.vision_model.", "vision_tower.", 1)

    def finalize(self) -> None:
        """Each layer is packed once it is filled."""
