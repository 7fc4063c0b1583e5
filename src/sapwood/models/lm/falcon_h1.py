"""Falcon H1. Source: Technology Innovation Institute 2025, arXiv:2507.22448."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.layer import FeedForward, Mixer, Sublayer
from sapwood.layers.mamba2 import Mamba2, Mamba2Layout
from sapwood.layers.side_by_side import NamedMixer, SideBySide
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import integer, number, switch
from sapwood.models.lm.architecture import Architecture, Names
from sapwood.models.lm.state_space import BAMBA_FIELDS, dt_range, with_states


class FalconH1ForCausalLM(Architecture):
    """Attention and Mamba 2 side by side in each layer, and many multipliers."""

    absent: ClassVar = {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 8,
        "mamba_d_ssm": 1024,
        "mamba_conv_bias": True,
        "mamba_norm_before_gate": True,
    }
    has_windows = False
    can_be_rescaled = False
    names = Names(
        norm="model.final_layernorm",
        mixer="",
        feed_forward="feed_forward",
        before_feed_forward="pre_ff_layernorm",
    )

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        for name, length in (("mlp_multipliers", 2), ("ssm_multipliers", 5)):
            _multipliers(config.hf, name, length)
        return with_states(
            config,
            _layout(config.hf),
            tuple(range(config.num_layers, 2 * config.num_layers)),
        )

    def mixer(self, index: int) -> Mixer:
        hf, bias = self.config.hf, self.config.attention_bias
        # Factors of queries, keys and values are those of scores and of outputs.
        inner = number(hf, "attention_in_multiplier", default=1.0)
        if bias and inner != 1.0:
            raise ConfigError("config.json asks for biases and for attention_in_multiplier, which "
                              "is not implemented")  # fmt: skip
        scale = inner**2 * number(hf, "key_multiplier", default=1.0)
        attention = self.attention(
            index,
            qkv_bias=bias,
            o_bias=bias,
            scale=scale * self.config.head_dim**-0.5,
        )
        factor = inner * number(hf, "attention_out_multiplier", default=1.0)
        return SideBySide(
            [
                NamedMixer(
                    "mamba", self.mamba(index), number(hf, "ssm_out_multiplier", default=1.0)
                ),
                NamedMixer("self_attn", attention, factor),
            ]
        )

    def mamba(self, index: int) -> Mixer:
        """The states of a layer count as those of another one, since a layer has one cache."""
        hf = self.config.hf
        bias, inner = switch(hf, "mamba_proj_bias"), number(hf, "ssm_in_multiplier", default=1.0)
        if bias and inner != 1.0:
            raise ConfigError(
                "config.json asks for mamba_proj_bias and for ssm_in_multiplier, which is not "
                "implemented"
            )
        z, x, b, c, dt = (inner * one for one in _multipliers(hf, "ssm_multipliers", 5))
        return Mamba2(
            self.build,
            self.config.num_layers + index,
            self.config.hidden_size,
            _layout(hf),
            bias=bias,
            out_bias=switch(hf, "projectors_bias"),
            conv_bias=switch(hf, "mamba_conv_bias"),
            norm_eps=self.config.norm_eps if switch(hf, "mamba_rms_norm") else None,
            norms_first=switch(hf, "mamba_norm_before_gate"),
            dt_range=dt_range(hf),
            factors=(z, x, b, c, dt),
        )

    def feed_forward_sublayer(self, index: int) -> Sublayer[FeedForward]:
        _, down = _multipliers(self.config.hf, "mlp_multipliers", 2)
        return replace(super().feed_forward_sublayer(index), scale=down)

    def feed_forward(self, index: int) -> FeedForward:
        gate, _ = _multipliers(self.config.hf, "mlp_multipliers", 2)
        return self.gated_mlp(bias=self.config.mlp_bias, gate_factor=gate)

    def embedding(self, *, scale: float = 1.0) -> VocabEmbedding:
        factor = number(self.config.hf, "embedding_multiplier", default=1.0)
        return super().embedding(scale=scale * factor)

    def head(self, tied: VocabEmbedding | None, **details: Any) -> LMHead:
        factor = number(self.config.hf, "lm_head_multiplier", default=1.0)
        return super().head(tied, scale=factor, **details)


def _layout(hf: Mapping[str, Any]) -> Mamba2Layout:
    return BAMBA_FIELDS.layout(hf, width=integer(hf, "mamba_d_ssm"))


def _multipliers(hf: Mapping[str, Any], name: str, length: int) -> list[float]:
    """A list of numbers; ConfigError if it has another length."""
    said = hf.get(name)
    if said is None:
        return [1.0] * length
    if not isinstance(said, list | tuple) or len(said) != length:
        raise ConfigError(f"config.json must have {length} numbers as {name!r}, got {said!r}")
    return [number({name: one}, name) for one in said]
