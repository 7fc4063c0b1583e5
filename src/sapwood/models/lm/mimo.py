"""MiMo-7B. Source: Xiaomi 2025, arXiv:2505.07608."""

from __future__ import annotations

from sapwood.models.config import DecoderConfig
from sapwood.models.drafts.head import Combination, projection
from sapwood.models.lm.architecture import one_layer_more
from sapwood.models.lm.qwen2 import Qwen2ForCausalLM

PREDICTOR = "model.mtp_layers.0"


class MiMoForCausalLM(Qwen2ForCausalLM):
    """Qwen 2; the first of the layers that predict further tokens is used for drafts alone."""

    ignorable = (*Qwen2ForCausalLM.ignorable, "model.mtp_layers.*")

    @classmethod
    def with_predictor(cls, config: DecoderConfig) -> DecoderConfig | None:
        return one_layer_more(config, count_field="num_nextn_predict_layers")

    def predictor(self) -> Combination:
        size = self.config.hidden_size
        return Combination(
            projection=projection(
                self.build, f"{PREDICTOR}.input_proj", 2 * size, size, bias=False
            ),
            embedding_norm=self.named_norm(f"{PREDICTOR}.token_layernorm"),
            state_norm=self.named_norm(f"{PREDICTOR}.hidden_layernorm"),
            states_first=True,
            drops_first=True,
            layers={PREDICTOR: self.layer(self.config.num_layers - 1)},
            norm=self.named_norm(f"{PREDICTOR}.final_layernorm"),
        )
