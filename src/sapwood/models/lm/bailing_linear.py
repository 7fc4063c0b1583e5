"""Ling 2.5 and Ring Linear: lightning attention in most layers, latent or grouped attention in the
others, and a mixture of experts.

Source: Ling Team 2025, arXiv:2510.19338, and the model code of Ling 2.5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.layers.heads import HeadLayout, alibi_slopes
from sapwood.layers.layer import Mixer
from sapwood.layers.lightning import cache_group
from sapwood.layers.rope_config import RopeConfig
from sapwood.layers.rotated_lightning import RotatedLightningAttention
from sapwood.models.config import FULL, DecoderConfig
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.bailing_moe import BailingMoeV2ForCausalLM
from sapwood.models.lm.delta import LINEAR, linear_layers
from sapwood.models.lm.latent import InterleavedByField


class BailingMoeLinearV2ForCausalLM(BailingMoeV2ForCausalLM):
    """Each layer_group_size-th layer, and those after the last whole group, have the attention of
    Ling 2. The layers that predict further tokens are not used."""

    absent: ClassVar = {
        **BailingMoeV2ForCausalLM.absent,
        "first_k_dense_replace": 1,
        "group_norm_size": 1,
        "layer_group_size": 5,
        "rope_theta": 600_000.0,
    }
    lightning_out: ClassVar = "dense"
    """Name of the output projection of lightning attention."""

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        layers, group, heads = (
            integer(found, name)
            for name in ("num_hidden_layers", "layer_group_size", "num_attention_heads")
        )
        if group < 1 or heads < 1:
            raise ConfigError(
                f"config.json has layer_group_size {group} and num_attention_heads {heads}; both "
                "must be >= 1"
            )
        whole = layers // group * group
        attends = [(index + 1) % group == 0 or index >= whole for index in range(layers)]
        found.setdefault("layer_types", [FULL if one else LINEAR for one in attends])
        size = hf.get("head_dim") or integer(found, "hidden_size") // heads
        found.setdefault("linear_head_dim", size)
        return found

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        for name, value in (
            ("linear_silu", False),
            ("use_linear_silu", False),
            ("linear_rope", True),
            ("use_bias", False),
        ):
            if hf.get(name, value) not in (value, None):
                raise ConfigError(
                    f"config.json's {name} is {hf[name]!r}; only {value!r} is implemented"
                )
        config = super().read(hf)
        layers, heads = linear_layers(config), _heads(config)
        return replace(
            config,
            states=(cache_group(heads, layers),) if layers else (),
            state_layer_parameters=5 * heads.num_heads * heads.head_dim * config.hidden_size,
        )

    @classmethod
    def with_predictor(cls, config: DecoderConfig) -> DecoderConfig | None:
        return None

    def mixer(self, index: int) -> Mixer:
        config, hf = self.config, self.config.hf
        if index not in config.layers_with_states:
            return self.full_attention(index)
        heads = _heads(config)
        return RotatedLightningAttention(
            self.build,
            index,
            config.hidden_size,
            heads,
            slopes(heads.num_heads, index, config.num_layers),
            cos_sin=self.cos_sin(config.rope, heads.head_dim),
            num_groups=integer(hf, "group_norm_size"),
            eps=config.norm_eps,
            norms_heads=switch(hf, "use_qk_norm"),
            qkv_bias=switch(hf, "use_qkv_bias"),
            out_name=self.lightning_out,
        )

    def full_attention(self, index: int) -> Mixer:
        """The mixer of a layer that keeps keys and values."""
        return super().mixer(index)


class BailingMoeV2_5ForCausalLM(  # noqa: N801 as config.json spells it
    InterleavedByField, BailingMoeLinearV2ForCausalLM
):
    """Latent attention, all of whose rotated entries rotate, in place of the grouped one."""

    absent: ClassVar = {
        **BailingMoeLinearV2ForCausalLM.absent,
        "group_norm_size": 4,
        "n_group": 8,
        "partial_rotary_factor": 0.5,
        "topk_group": 4,
    }
    lightning_out: ClassVar = "o_proj"  # as latent attention has it

    @classmethod
    def checkpoint_name(cls, name: str) -> str:
        return name.replace(".attention.dense.", ".attention.o_proj.")

    def mixer(self, index: int) -> Mixer:
        return BailingMoeLinearV2ForCausalLM.mixer(self, index)

    def full_attention(self, index: int) -> Mixer:
        return self.latent_attention(index, bias=switch(self.config.hf, "use_qkv_bias"))

    def rope_of(self, index: int) -> RopeConfig | None:
        return replace(self.config.rope, partial_factor=1.0)


def slopes(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """[num_heads] fp32: how fast the heads' states fade, less in later layers and heads."""
    depth = 1 - (layer - 1) / max(1, num_layers - 1) + 1e-5
    return alibi_slopes(num_heads).to(torch.float32) * depth


def _heads(config: DecoderConfig) -> HeadLayout:
    """Of lightning attention, where keys and values have as many heads as queries."""
    size = integer(config.hf, "linear_head_dim")
    if size < 1:
        raise ConfigError(f"config.json's head_dim is {size} but must be >= 1")
    return HeadLayout(num_heads=config.num_heads, num_kv_heads=config.num_heads, head_dim=size)
