"""GLM-4.5 and its kin. Source: GLM-4.5 Team 2025, arXiv:2508.06471."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.layer import Mixer
from sapwood.models.config import DecoderConfig
from sapwood.models.drafts.head import Combination
from sapwood.models.lm.architecture import Architecture, one_layer_more
from sapwood.models.lm.grouped_mixture import GroupedMixture


class Glm4MoeForCausalLM(GroupedMixture):
    """Norms over each q and k head where the config says so; the layer that predicts further tokens
    is used for drafts alone."""

    absent: ClassVar = {
        **GroupedMixture.absent,
        "partial_rotary_factor": 0.5,
        "routed_scaling_factor": 1.0,
    }
    has_windows = False

    @property
    def ignorable(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*Architecture.ignorable, f"model.layers.{self.config.num_layers}.*")

    def mixer(self, index: int) -> Mixer:
        norms = self.rms_norm if self.config.hf.get("use_qk_norm") else None
        return self.attention(
            index,
            qkv_bias=self.config.attention_bias,
            qk_norm=norms,
            eps=self.config.norm_eps,
        )

    @classmethod
    def with_predictor(cls, config: DecoderConfig) -> DecoderConfig | None:
        return one_layer_more(config, count_field="num_nextn_predict_layers")

    def predictor(self) -> Combination:
        return self.next_layer(norm="shared_head.norm")
