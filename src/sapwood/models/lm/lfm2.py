"""LFM2, which mixes tokens by short convolutions in most layers and by attention in the others.

Source: Liquid AI 2025, arXiv:2511.23404."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.layer import FeedForward, Layer, Mixer, Sublayer
from sapwood.layers.short_conv import ConvLayout, ShortConv
from sapwood.models.config import FULL, DecoderConfig
from sapwood.models.hf_fields import integer, number, switch
from sapwood.models.lm.architecture import Architecture, Names

CONV = "conv"
"""Kind of the layers with a convolution, in config.json's layer_types."""


class Lfm2ForCausalLM(Architecture):
    """Norms over each q and k head in the attention layers; gated feed-forwards in all."""

    absent: ClassVar = {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 128_000,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "block_auto_adjust_ff_dim": True,
    }
    spelled: ClassVar = {"rms_norm_eps": "norm_eps"}
    has_windows = False
    can_be_rescaled = False
    names = Names(
        norm="model.embedding_norm",
        feed_forward="feed_forward",
        before_mixer="operator_norm",
        before_feed_forward="ffn_norm",
    )

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        # The names in the first published files; where both are there, these count.
        for ours, first in (
            ("tie_word_embeddings", "tie_embedding"),
            ("intermediate_size", "block_ff_dim"),
        ):
            found[ours] = found.get(first, found.get(ours))
        return found

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        layout = _conv_layout(config)
        convolved = _convolved_layers(config)
        return replace(
            config,
            intermediate_size=_intermediate_size(config),
            states=(layout.cache_group(convolved),) if convolved else (),
            state_layer_parameters=layout.channels * (4 * layout.channels + layout.length),
        )

    def layer(self, index: int) -> Layer:
        is_convolved = any(index in group.layers for group in self.config.states)
        return Layer(
            Sublayer(
                name="conv" if is_convolved else "self_attn",
                body=self.convolution(index) if is_convolved else self.mixer(index),
                before=self.named_norm("operator_norm"),
            ),
            Sublayer(
                name="feed_forward",
                body=self.feed_forward(index),
                before=self.named_norm("ffn_norm"),
            ),
        )

    def mixer(self, index: int) -> Mixer:
        return self.attention(
            index,
            qk_norm=self.rms_norm,
            eps=self.config.norm_eps,
            norm_names=("q_layernorm", "k_layernorm"),
            o_name="out_proj",
        )

    def convolution(self, index: int) -> Mixer:
        bias = switch(self.config.hf, "conv_bias")
        return ShortConv(self.build, index, _conv_layout(self.config), bias=bias)

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(names=("w1", "w3", "w2"))


def _conv_layout(config: DecoderConfig) -> ConvLayout:
    length = integer(config.hf, "conv_L_cache", default=3)
    if not 2 <= length <= 1024:
        raise ConfigError(f"config.json's conv_L_cache is {length} but must be from 2 to 1024")
    return ConvLayout(channels=config.hidden_size, length=length)


def _convolved_layers(config: DecoderConfig) -> tuple[int, ...]:
    """The layers with a convolution: as layer_types says, else all that full_attn_idxs leaves out;
    without either every layer has attention."""
    kinds, number = config.hf.get("layer_types"), config.num_layers
    if kinds is None:
        attending = config.hf.get("full_attn_idxs", list(range(number)))
        if not isinstance(attending, list) or not set(range(number)).issuperset(attending):
            raise ConfigError(
                f"config.json must have indices of its {number} layers in 'full_attn_idxs', got "
                f"{attending!r}"
            )
        return tuple(index for index in range(number) if index not in attending)
    if not isinstance(kinds, list) or len(kinds) != number or not {FULL, CONV}.issuperset(kinds):
        raise ConfigError(
            f"config.json must have {FULL} or {CONV} for each of its {number} layers in "
            f"'layer_types', got {kinds!r}"
        )
    return tuple(index for index, kind in enumerate(kinds) if kind == CONV)


def _intermediate_size(config: DecoderConfig) -> int:
    """Of the feed-forwards; most files say that it is two thirds, rounded up to whole blocks."""
    size, hf = config.intermediate_size, config.hf
    if not switch(hf, "block_auto_adjust_ff_dim"):
        return size
    block = integer(hf, "block_multiple_of", default=256)
    if block < 1:
        raise ConfigError(f"config.json's block_multiple_of is {block} but must be >= 1")
    size = int(number(hf, "block_ffn_dim_multiplier", default=1.0) * int(2 * size / 3))
    return -(-size // block) * block
