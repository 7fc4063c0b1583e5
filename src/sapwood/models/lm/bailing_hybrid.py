"""Ling 3: Kimi delta attention with bounded decays in most layers, gated latent attention in the
others, and a mixture of experts. Source: Ling Team 2026, its model code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.bounded_delta import BoundedDeltaAttention
from sapwood.layers.delta import DeltaLayout
from sapwood.layers.layer import Mixer
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.architecture import Architecture, Names
from sapwood.models.lm.delta import checked, every_nth_attends, with_states
from sapwood.models.lm.grouped_mixture import GroupedMixture
from sapwood.models.lm.kimi_linear import KimiLinearForCausalLM
from sapwood.models.lm.latent import InterleavedByField, dense_layers_of


class BailingHybridForCausalLM(InterleavedByField, GroupedMixture):
    """Experts are DeepSeek V3's. The layers that predict further tokens are not used."""

    absent: ClassVar = {
        **GroupedMixture.absent,
        "first_k_dense_replace": 2,
        "kda_lower_bound": -5.0,
        "kda_safe_gate": True,
        "layer_group_size": 6,
        "max_position_embeddings": 262_144,
        "n_group": 8,
        "rope_theta": 6_000_000.0,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
    }
    spelled: ClassVar = KimiLinearForCausalLM.spelled
    correction_name = "gate.expert_bias"
    names = Names(embedding="model.word_embeddings", mixer="attention")

    @property
    def ignorable(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*Architecture.ignorable, f"model.layers.{self.config.num_layers}.*")

    @classmethod
    def checkpoint_name(cls, name: str) -> str:
        return name.replace(".attention.dense.", ".attention.o_proj.")

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Published files say the size of linear attention's heads as head_dim."""
        found = super().understood(hf)
        found.setdefault("linear_head_dim", hf.get("head_dim") or 128)
        number_of_layers, group = (
            integer(found, name) for name in ("num_hidden_layers", "layer_group_size")
        )
        found.setdefault("layer_types", every_nth_attends(number_of_layers, group))
        return found

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        said = config.hf.get("gated_attention_proj_granularity_type", "head_wise")
        if said != "head_wise":
            raise ConfigError(
                f"config.json asks for gates of attention that are {said!r}; only 'head_wise' is "
                "implemented"
            )
        config = with_states(config, _layout(config.hf))
        hidden, heads = config.hidden_size, config.num_heads
        decays = hidden * heads * (integer(config.hf, "linear_head_dim") - 1)
        num_attending = config.num_layers - len(config.layers_with_states)
        return replace(
            config,
            # Beyond the usual ones: an output per channel for the decays, and gates of attention.
            state_layer_parameters=config.state_layer_parameters + decays,
            other_parameters=num_attending * hidden * heads,
        )

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        found = super().experts_in(config)
        return replace(found, dense_layers=dense_layers_of(config, found.dense_layers))

    def mixer(self, index: int) -> Mixer:
        config = self.config
        if index not in config.layers_with_states:
            return self.latent_attention(index, gate_name="g_proj")
        return BoundedDeltaAttention(
            self.build,
            index,
            config.hidden_size,
            _layout(config.hf),
            eps=config.norm_eps,
        )


def _layout(hf: Mapping[str, Any]) -> DeltaLayout:
    heads, size = integer(hf, "num_attention_heads"), integer(hf, "linear_head_dim")
    return checked(
        DeltaLayout(
            num_key_heads=heads,
            num_heads=heads,
            key_dim=size,
            value_dim=size,
            length=integer(hf, "short_conv_kernel_size", default=4),
            per_channel=True,
            lowest=_lowest_decay(hf),
        )
    )


def _lowest_decay(hf: Mapping[str, Any]) -> float | None:
    """The logarithm of the lowest decay; None if there is none."""
    if not switch(hf, "kda_safe_gate"):
        return None
    said = hf["kda_lower_bound"]
    if isinstance(said, bool) or not isinstance(said, int | float) or not -math.inf < said < 0:
        raise ConfigError(
            f"config.json must have a number below 0 as 'kda_lower_bound', got {said!r}"
        )
    return float(said)
