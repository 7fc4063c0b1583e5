"""Towers of Aya Vision and Command A Vision: SigLIP's, whose patches are put together by blocks.

Source: Dash et al. 2025, arXiv:2505.08751; Cohere 2025, Command A Vision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.layers.build import Build
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, prefixed
from sapwood.models.hf_fields import epsilon, integer
from sapwood.models.vision.blocks import PatchNorm, Projector
from sapwood.models.vision.tiles import blocks_of
from sapwood.models.vision.tower import TileTower
from sapwood.models.vision.vit import ViT
from sapwood.schema.media import Medium


class Cohere2VisionTower(TileTower):
    """The last states, normed; a projector whose second half gates its first."""

    has_last_norm = True

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = {"hidden_act": "gelu_pytorch_tanh", **hf_config["vision_config"]}
        if hf.get("model_type", "siglip_vision_model") != "siglip_vision_model":
            raise ConfigError(
                f"this model's tower is a {hf['model_type']!r}, which is not implemented there; "
                "serve its text part with --language-only"
            )
        layer = hf_config.get("vision_feature_layer", -1)
        if layer != -1:
            raise ConfigError(
                f"config.json has vision_feature_layer {layer!r}; the last one is implemented. "
                "Serve the text part with --language-only"
            )
        depth = integer(hf, "num_hidden_layers")
        self._vit = ViT(
            build, hf, num_layers=depth, has_class=False, has_last_norm=self.has_last_norm
        )
        self.form = self._vit.form
        self._scale = integer(hf_config, "downsample_factor", default=2)
        self.tokens_per_tile = (self._vit.side // self._scale) ** 2
        self.vector_size = integer(hf_config["text_config"], "hidden_size")
        width = self._vit.size * self._scale**2
        inner = integer(hf_config, "alignment_intermediate_size", default=self._inner_by_default())
        self._project = Projector(
            build,
            (width, inner, self.vector_size),
            activation=Activation.SILU,
            norm=self._norm(hf_config, build, width),
            gates=True,
        )

    def _inner_by_default(self) -> int:
        return 36_864

    def _norm(
        self, hf_config: Mapping[str, Any], build: Build, width: int
    ) -> tuple[str, PatchNorm] | None:
        return None

    def vectors(self, media: Sequence[Medium]) -> Tensor:
        return self._project(blocks_of(self._vit(media), self._scale))

    def targets(self) -> dict[str, Target]:
        return {
            **prefixed("vision_tower", self._vit.targets()),
            **prefixed("multi_modal_projector", self._project.targets()),
        }

    def checkpoint_name(self, name: str) -> str:
        own = name.removeprefix("model.")
        return own.replace("vision_tower.vision_model.", "vision_tower.", 1)


class AyaVisionTower(Cohere2VisionTower):
    """The last states as they are, with a norm of the blocks."""

    has_last_norm = False

    def _inner_by_default(self) -> int:
        return self.vector_size

    def _norm(
        self, hf_config: Mapping[str, Any], build: Build, width: int
    ) -> tuple[str, PatchNorm] | None:
        eps = epsilon(hf_config, "adapter_layer_norm_eps", default=1e-6)
        return "layernorm", LayerNorm(build, width, eps=eps)
