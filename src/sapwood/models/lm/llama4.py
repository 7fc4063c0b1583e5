"""Llama 4's language model. Source: Meta AI 2025, its model code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.routing import Routing, Scores
from sapwood.layers.experts import Fused
from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import Mixer
from sapwood.layers.norm import RMSNorm
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import FULL, SLIDING, DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer, number
from sapwood.models.lm.architecture import Names
from sapwood.models.lm.mixture import MixtureArchitecture

_KINDS = {"chunked_attention": SLIDING, "full_attention": FULL}


class Llama4ForCausalLM(MixtureArchitecture):
    """Layers that rotate, whose tokens see their own chunk, and layers that do not rotate, whose
    queries grow with their positions; experts whose weights multiply their inputs."""

    absent: ClassVar = {
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "head_dim": 128,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "use_qk_norm": True,
    }
    names = Names(feed_forward="feed_forward")
    router_name = "router"
    shared_name = "shared_expert"
    weighs_inputs = True

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """A chunk is a window for the cache. intermediate_size is that of experts, and
        intermediate_size_mlp that of the other layers."""
        found = super().understood(hf)
        num_layers = integer(found, "num_hidden_layers")
        step = integer(found, "no_rope_layer_interval", default=4)
        rotates = found.get("no_rope_layers") or [
            int(step < 1 or (layer + 1) % step != 0) for layer in range(num_layers)
        ]
        kinds = found.get("layer_types") or [
            "chunked_attention" if layer else "full_attention" for layer in rotates
        ]
        for name, values in (("no_rope_layers", rotates), ("layer_types", kinds)):
            if not isinstance(values, list) or len(values) < num_layers:
                raise ConfigError(
                    f"config.json must have a list of {num_layers} layers as {name!r}, "
                    f"got {values!r}"
                )
        found |= {
            "no_rope_layers": rotates,
            "layer_types": [_KINDS.get(str(kind), kind) for kind in kinds[:num_layers]],
            "moe_intermediate_size": integer(found, "intermediate_size", default=8192),
            "intermediate_size": integer(found, "intermediate_size_mlp", default=16384),
        }
        found.pop("sliding_window", None)
        # An explicit null means no chunks.
        if hf.get("attention_chunk_size", found["attention_chunk_size"]) is not None:
            found["sliding_window"] = integer(found, "attention_chunk_size")
        return found

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        return replace(super().read(hf), has_chunks=True)

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        hf = config.hf
        step = max(1, integer(hf, "interleave_moe_layer_step", default=1))
        layers = range(config.num_layers)
        with_experts = hf.get("moe_layers", [layer for layer in layers if (layer + 1) % step == 0])
        if not isinstance(with_experts, list):
            raise ConfigError(
                f"config.json must have a list of layers as 'moe_layers', got {with_experts!r}"
            )
        size = integer(hf, "moe_intermediate_size")
        return ExpertsConfig(
            num_experts=integer(hf, "num_local_experts"),
            num_per_token=integer(hf, "num_experts_per_tok"),
            intermediate_size=size,
            shared_size=size,
            dense_layers=tuple(layer for layer in layers if layer not in with_experts),
        )

    def files(self) -> Fused:
        return Fused(gate_up="experts.gate_up_proj", down="experts.down_proj", transposed=True)

    def routing(self, experts: ExpertsConfig) -> Routing:
        return Routing(num_chosen=experts.num_per_token, scores=Scores.SIGMOID)

    def rope_of(self, index: int) -> RopeConfig | None:
        return self.config.rope if self._rotates(index) else None

    def mixer(self, index: int) -> Mixer:
        config, rotates = self.config, self._rotates(index)
        # The norm comes after the rotation there. It has no weight and a rotation keeps lengths,
        # so the order makes no difference.
        has_norm = rotates and bool(config.hf["use_qk_norm"])
        is_tuned = not rotates and bool(config.hf["attn_temperature_tuning"])
        return self.attention(
            index,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            form=QkvForm(pairs=config.rope.rotary_dim(config.head_dim)),
            qk_norm=self._head_norm if has_norm else None,
            eps=config.norm_eps,
            query_scale=self._query_scale if is_tuned else None,
        )

    def _rotates(self, index: int) -> bool:
        return bool(self.config.hf["no_rope_layers"][index])

    def _head_norm(self, size: int) -> RMSNorm:
        return RMSNorm(self.build, size, eps=self.config.norm_eps, is_learned=False)

    @cached_property
    def _query_scale(self) -> Tensor | None:
        """[positions] fp32: 1 + attn_scale * log(1 + (position + 1) // floor_scale); None: 1
        everywhere"""
        hf, length = self.config.hf, self.config.context_length
        floor_scale = integer(hf, "floor_scale", default=8192)
        if length < floor_scale:
            return None
        times = (torch.arange(length, device=self.build.device) + 1) // max(1, floor_scale)
        return 1 + number(hf, "attn_scale", default=0.1) * torch.log1p(times.float())
