"""Towers of LLaVA's families: CLIP's, or SigLIP's, and two linear layers.

Source: Liu et al. 2023, arXiv:2310.03744; Cai et al. 2023, arXiv:2312.00784 (ViP-LLaVA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.layers.build import Build
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, prefixed
from sapwood.models.hf_fields import activation, epsilon, integer
from sapwood.models.vision.blocks import PatchNorm, Projector
from sapwood.models.vision.tower import TileTower
from sapwood.models.vision.vit import ViT
from sapwood.schema.media import Medium

_KINDS = ("clip_vision_model", "siglip_vision_model")


class LlavaTower(TileTower):
    """States after one layer or several, side by side, each made a vector of the decoder's size."""

    layer_by_default: ClassVar[int | list[int]] = -2
    strategy_by_default: ClassVar[str] = "default"

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = hf_config["vision_config"]
        kind = hf.get("model_type")
        if kind not in _KINDS:
            raise ConfigError(
                f"the tower of this LLaVA is a {kind!r}, which is not implemented there; known: "
                f"{', '.join(_KINDS)}. Serve its text part with --language-only"
            )
        depth = integer(hf, "num_hidden_layers")
        self._after = self._layers_of(hf_config, depth)
        self._vit = ViT(
            build,
            hf,
            num_layers=max(self._after),
            has_class=kind == _KINDS[0],
            has_last_norm=False,
        )
        self.form = self._vit.form
        strategy = hf_config.get("vision_feature_select_strategy", self.strategy_by_default)
        self._num_skipped = 0 if strategy == "full" else 1
        self.tokens_per_tile = self._vit.num_places - self._num_skipped
        self.vector_size = integer(hf_config["text_config"], "hidden_size")
        size = self._vit.size * len(self._after)
        self._project = Projector(
            build,
            (size, self.vector_size, self.vector_size),
            activation=Activation(activation(hf_config, "projector_hidden_act", default="gelu")),
            bias=hf_config.get("multimodal_projector_bias", True),
            norm=self._projector_norm(hf_config, build, size),
        )

    def _layers_of(self, hf_config: Mapping[str, Any], depth: int) -> list[int]:
        """After how many layers the states are taken that a vector is made of."""
        said = hf_config.get("vision_feature_layer", self.layer_by_default)
        layers = said if isinstance(said, list) else [said]
        found = [
            layer if layer >= 0 else depth + 1 + layer
            for layer in layers
            if isinstance(layer, int) and -depth - 1 <= layer <= depth
        ]
        if len(found) != len(layers) or not found:
            raise ConfigError(
                f"config.json has vision_feature_layer {said!r}; layers of the {depth} that there "
                "are can be taken. Serve the text part with --language-only"
            )
        return found

    def _projector_norm(
        self, hf_config: Mapping[str, Any], build: Build, size: int
    ) -> tuple[str, PatchNorm] | None:
        return None

    def vectors(self, media: Sequence[Medium]) -> Tensor:
        found = self._vit.states(media, set(self._after))
        kept = dict(zip(sorted(set(self._after)), found, strict=False))
        x = torch.cat([kept[layer] for layer in self._after], dim=2)
        return self._project(x[:, self._num_skipped :].flatten(0, 1))

    def targets(self) -> dict[str, Target]:
        return {
            **prefixed("vision_tower", self._vit.targets()),
            **prefixed("multi_modal_projector", self._project.targets()),
        }

    def checkpoint_name(self, name: str) -> str:
        own = name.removeprefix("model.")
        return own.replace("vision_tower.vision_model.", "vision_tower.", 1)


class VipLlavaTower(LlavaTower):
    """States of five layers, with a norm before they become a vector."""

    layer_by_default: ClassVar = [-2, -5, -8, -11, 6]

    def _projector_norm(
        self, hf_config: Mapping[str, Any], build: Build, size: int
    ) -> tuple[str, PatchNorm] | None:
        eps = epsilon(hf_config, "projector_layernorm_eps", default=1e-5)
        return "projector_layernorm", LayerNorm(build, size, eps=eps)
