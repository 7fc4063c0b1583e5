"""Gemma 3. Source: Gemma Team 2025, arXiv:2503.19786."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from sapwood.layers.layer import Mixer
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import FULL, every_nth_full
from sapwood.models.hf_fields import integer, number
from sapwood.models.lm.gemma2 import Gemma2ForCausalLM


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Gemma 2 without caps, with a norm over each q and k head; five of six layers have a window,
    and a rotary embedding of their own."""

    absent: ClassVar = {
        **Gemma2ForCausalLM.absent,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "max_position_embeddings": 131_072,
    }

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        absent = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        found = super().understood({**absent, **hf})
        if hf.get("layer_types") is None:
            period = integer(hf, "sliding_window_pattern", default=6)
            found["layer_types"] = every_nth_full(integer(hf, "num_hidden_layers"), period)
        return found

    def rope_of(self, index: int) -> RopeConfig | None:
        hf = self.config.hf
        if hf["layer_types"][index] == FULL:
            return self.config.rope
        return self.rope_of_windows({"rope_theta": number(hf, "rope_local_base_freq")})

    def mixer(self, index: int) -> Mixer:
        return self.attention(
            index,
            scale=number(self.config.hf, "query_pre_attn_scalar") ** -0.5,
            qk_norm=partial(self.rms_norm, adds_one=True),
        )
