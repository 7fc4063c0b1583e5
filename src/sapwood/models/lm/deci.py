"""DeciLM and Llama Nemotron, whose layers differ. Source: Bercovich et al. 2024,
arXiv:2411.19146."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.layer import FeedForward, Layer, PartialLayer
from sapwood.models.config import AttentionHeads, DecoderConfig
from sapwood.models.hf_fields import integer, number, switch
from sapwood.models.lm.llama import LlamaForCausalLM

_MULTIPLE = 256
"""Intermediate sizes are multiples of this."""


_SIZES_FROM_GGUF = "intermediate_sizes_per_layer"
"""A field that only files have which were made of GGUF files (store/gguf_config)."""


class DeciLMForCausalLM(LlamaForCausalLM):
    """Llama, where each layer has its own number of key and value heads and its own intermediate
    size, and some have no attention or no feed-forward."""

    absent: ClassVar = {"rope_theta": 10_000.0}

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        num_layers = integer(found, "num_hidden_layers")
        for name in ("block_configs", "num_key_value_heads_per_layer", _SIZES_FROM_GGUF):
            said = found.get(name)
            if said is not None and (not isinstance(said, list) or len(said) != num_layers):
                raise ConfigError(
                    f"config.json must have an entry for each of its {num_layers} layers in "
                    f"{name!r}"
                )
        if "block_configs" in found:
            found["intermediate_size"] = max(_sizes(found))
        # What counts is of each layer.
        found["num_key_value_heads"] = integer(found, "num_attention_heads")
        return found

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        found, num_heads = config.hf, config.num_heads
        if "block_configs" in found:
            kv_heads = [_kv_heads(one, num_heads) for one in found["block_configs"]]
            config = replace(config, intermediate_sizes=_sizes(found))
        elif "num_key_value_heads_per_layer" in found:
            kv_heads = found["num_key_value_heads_per_layer"]
            sizes = tuple(found.get(_SIZES_FROM_GGUF, ()))
            config = replace(config, intermediate_sizes=sizes)
        else:
            kv_heads = [integer(hf, "num_key_value_heads", default=num_heads)] * config.num_layers
        heads = tuple(
            AttentionHeads(num_heads=num_heads, num_kv_heads=one, head_dim=config.head_dim)
            if one
            else None
            for one in kv_heads
        )
        return replace(config, heads_by_layer=heads)

    def layer(self, index: int) -> Layer:
        has_attention = self.config.heads_of(index) is not None
        has_feed_forward = self.config.intermediate_size_of(index) > 0
        if has_attention and has_feed_forward:
            return super().layer(index)
        return PartialLayer(
            mixer=self.mixer_sublayer(index) if has_attention else None,
            feed_forward=self.feed_forward_sublayer(index) if has_feed_forward else None,
        )

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(
            bias=self.config.mlp_bias, size=self.config.intermediate_size_of(index)
        )


def _sizes(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """The intermediate size of each layer, 0 without a feed-forward."""
    return tuple(_size(one, integer(hf, "hidden_size")) for one in hf["block_configs"])


def _size(block: Mapping[str, Any], hidden_size: int) -> int:
    said = _part(block, "ffn")
    if switch(said, "no_op"):
        return 0
    if said.get("intermediate_size") is not None:
        return integer(said, "intermediate_size")
    size = int(2 * number(said, "ffn_mult") * hidden_size / 3)
    return -(-size // _MULTIPLE) * _MULTIPLE


def _kv_heads(block: Mapping[str, Any], num_heads: int) -> int:
    """Key and value heads of a layer, 0 without attention."""
    said = _part(block, "attention")
    if switch(said, "no_op"):
        return 0
    per_group = integer(said, "n_heads_in_group")
    if per_group < 1 or num_heads % per_group:
        raise ConfigError(
            f"config.json has n_heads_in_group {per_group}, which does not divide the {num_heads} "
            "attention heads"
        )
    return num_heads // per_group


def _part(block: Any, name: str) -> Mapping[str, Any]:
    said = block.get(name) if isinstance(block, Mapping) else None
    if not isinstance(said, Mapping):
        raise ConfigError(f"config.json must have an object {name!r} in each of 'block_configs'")
    if switch(said, "replace_with_linear") or said.get("sparsify"):
        raise ConfigError(
            "config.json asks for replace_with_linear or sparsify in 'block_configs', which is not "
            "implemented"
        )
    return said
