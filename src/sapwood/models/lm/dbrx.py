"""DBRX. Source: Databricks 2024, its model code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.routing import Routing
from sapwood.layers.experts import Experts
from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import Mixer
from sapwood.layers.norm import Norm
from sapwood.layers.targets import Target
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer, optional_number
from sapwood.models.lm.architecture import Names
from sapwood.models.lm.mixture import MixtureArchitecture

_STACKED = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}
"""Tensors [experts * inner, hidden] in the checkpoint -> layers of each expert; those of w2 are the
other way round."""


class _StackedExperts(Experts):
    """Experts whose weights lie one below the other in three tensors."""

    def targets(self) -> dict[str, Target]:
        found = super().targets()
        for name, layer in _STACKED.items():
            own = [found.pop(key) for key in list(found) if key.endswith(f".{layer}.weight")]
            rows, columns = own[0].shape[:: -1 if name == "w2" else 1]
            put = partial(_place_each, own, is_turned=name == "w2")
            found[f"experts.mlp.{name}"] = Target((len(own) * rows, columns), put, has_rows=False)
        return found


class DbrxForCausalLM(MixtureArchitecture):
    """LayerNorms without bias, cut projections; a layer's experts lie in three tensors."""

    absent: ClassVar = {"rms_norm_eps": 1e-5}
    spelled: ClassVar = {
        "hidden_size": "d_model",
        "max_position_embeddings": "max_seq_len",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }
    names = Names(
        embedding="transformer.wte",
        layers="transformer.blocks",
        norm="transformer.norm_f",
        mixer="norm_attn_norm.attn",
        feed_forward="ffn",
        before_mixer="norm_attn_norm.norm_1",
        before_feed_forward="norm_attn_norm.norm_2",
    )
    router_name = "router.layer"
    experts_class = _StackedExperts
    has_windows = False
    can_be_rescaled = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        attention, experts = (_object(found, name) for name in ("attn_config", "ffn_config"))
        found["num_key_value_heads"] = integer(attention, "kv_n_heads", default=1)
        if (theta := attention.get("rope_theta")) is not None:
            found["rope_theta"] = theta
            found["rope_parameters"] = {**_object(found, "rope_parameters"), "rope_theta": theta}
        found["intermediate_size"] = integer(experts, "ffn_hidden_size", default=3584)
        found["hidden_act"] = _object(experts, "ffn_act_fn").get("name", "silu")
        if experts.get("moe_normalize_expert_weights", 1) not in (None, 1):
            raise ConfigError(
                "config.json asks for moe_normalize_expert_weights "
                f"{experts['moe_normalize_expert_weights']!r}; only 1 and null are implemented"
            )
        return {**found, "attn_config": attention, "ffn_config": experts}

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        said = config.hf["ffn_config"]
        return ExpertsConfig(
            num_experts=integer(said, "moe_num_experts", default=4),
            num_per_token=integer(said, "moe_top_k", default=1),
            intermediate_size=config.intermediate_size,
        )

    def routing(self, experts: ExpertsConfig) -> Routing:
        said = self.config.hf["ffn_config"].get("moe_normalize_expert_weights", 1)
        return Routing(num_chosen=experts.num_per_token, renormalise=said is not None)

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size, bias=False)

    def mixer(self, index: int) -> Mixer:
        return self.attention(
            index,
            clip=optional_number(self.config.hf["attn_config"], "clip_qkv"),
            form=QkvForm(fused="Wqkv"),
            o_name="out_proj",
        )


def _place_each(targets: Sequence[Target], stacked: Tensor, *, is_turned: bool) -> None:
    for target, weight in zip(targets, stacked.chunk(len(targets)), strict=True):
        target.place(weight.T if is_turned else weight)


def _object(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A field that is an object; an empty one if it is absent."""
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"config.json must have an object as {name!r}, got {value!r}")
    return value or {}
