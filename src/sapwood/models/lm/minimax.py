"""MiniMax-Text-01 and M1. Source: MiniMax 2025, arXiv:2501.08313."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.layers.heads import HeadLayout
from sapwood.layers.layer import Layer, Mixer, NormedResiduals
from sapwood.layers.lightning import LightningAttention, cache_group
from sapwood.models.config import FULL, DecoderConfig
from sapwood.models.hf_fields import number
from sapwood.models.lm.mixtral import MixtralForCausalLM
from sapwood.models.lm.state_space import LINEAR, kinds_of


class MiniMaxForCausalLM(MixtralForCausalLM):
    """Mixtral whose layers mostly have lightning attention; residuals are normed, and they and what
    is added to them have factors."""

    absent: ClassVar = {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    spelled: ClassVar = {
        f"{part}_{factor}_factor": (f"{part}_{factor}_factor", f"layernorm_{long}_{factor}")
        for part, long in (
            ("full_attn", "full_attention"),
            ("linear_attn", "linear_attention"),
            ("mlp", "mlp"),
        )
        for factor in ("alpha", "beta")
    }
    has_windows = False
    can_be_rescaled = False
    ignorable: ClassVar = (
        *MixtralForCausalLM.ignorable,
        "*.self_attn.slope_rate",  # follows from the layer, as do the next ones
        "*.self_attn.*_decay",
    )

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The first files say the kinds of layers by numbers, and how much of a head rotates."""
        found = super().understood(hf)
        listed = found.get("attn_type_list")
        if "layer_types" not in found and isinstance(listed, list):
            found["layer_types"] = [FULL if kind else LINEAR for kind in listed]
        if isinstance(found.get("rotary_dim"), int) and isinstance(found.get("head_dim"), int):
            found.setdefault("partial_rotary_factor", found["rotary_dim"] / found["head_dim"])
        return found

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        if config.hf.get("shared_intermediate_size"):
            raise ConfigError("config.json asks for shared experts, which are not implemented")
        kinds = kinds_of(config.hf, (FULL, LINEAR), "layer_types", num_layers=config.num_layers)
        layers = tuple(
            index
            for index in range(config.num_layers)
            if (index % 2 == 1 if kinds is None else kinds[index] == LINEAR)
        )
        width = config.num_heads * config.head_dim
        return replace(
            config,
            states=(cache_group(_heads(config), layers),) if layers else (),
            state_layer_parameters=5 * width * config.hidden_size,
        )

    def layer(self, index: int) -> Layer:
        kind = "linear_attn" if index in self.config.layers_with_states else "full_attn"
        return NormedResiduals(
            replace(self.mixer_sublayer(index), scale=self._factor(kind, "beta")),
            replace(self.feed_forward_sublayer(index), scale=self._factor("mlp", "beta")),
            residual_scales=(self._factor(kind, "alpha"), self._factor("mlp", "alpha")),
        )

    def mixer(self, index: int) -> Mixer:
        config = self.config
        if index not in config.layers_with_states:
            return super().mixer(index)
        return LightningAttention(
            self.build,
            index,
            config.num_layers,
            config.hidden_size,
            _heads(config),
            activation=Activation(config.activation),
        )

    def _factor(self, part: str, factor: str) -> float:
        return number(self.config.hf, f"{part}_{factor}_factor", default=1.0)


def _heads(config: DecoderConfig) -> HeadLayout:
    """Of lightning attention, where keys and values have as many heads as queries."""
    return HeadLayout(
        num_heads=config.num_heads, num_kv_heads=config.num_heads, head_dim=config.head_dim
    )
