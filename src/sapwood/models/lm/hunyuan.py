"""Hunyuan without experts. Source: Tencent 2025, its model code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.layers.layer import Mixer
from sapwood.models.hf_fields import integer, number
from sapwood.models.lm.architecture import Architecture


class HunYuanDenseV1ForCausalLM(Architecture):
    """Llama with a norm over each q and k head after the rotation, whose base may be stretched."""

    absent: ClassVar = {"rms_norm_eps": 1e-5}
    has_windows = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        for field in ("rope_scaling", "rope_parameters"):
            said = found.get(field)
            if isinstance(said, Mapping) and said.get("alpha"):
                found[field] = _stretched(said, found)
        return found

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(
            index,
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=self.rms_norm,
            norms_after_rotation=True,
            norm_names=("query_layernorm", "key_layernorm"),
        )


def _stretched(said: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """Plain rope parameters with the base theta * alpha ** (D / (D - 2)), whatever the length."""
    heads = max(1, integer(hf, "num_attention_heads"))
    size = integer(hf, "head_dim", default=integer(hf, "hidden_size") // heads)
    theta = number({**hf, **said}, "rope_theta", default=10_000.0)
    stretched = theta * number(said, "alpha") ** (size / max(1, size - 2))
    return {"rope_type": "default", "rope_theta": stretched}
