"""Gemma 3n without its parts that see and hear. Source: Google 2025, its model code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.layers.altup import AltUpForm, AltUpLayer, AltUpStreams
from sapwood.layers.layer import FeedForward, Layer, Mixer, Sublayer
from sapwood.layers.mlp import SparseGatedMLP
from sapwood.layers.norm import RMSNorm
from sapwood.layers.per_layer import PerLayerBlock, PerLayerInputs
from sapwood.layers.shared_attention import SharedAttention
from sapwood.layers.streams import Streams
from sapwood.models.config import AttentionHeads, DecoderConfig, every_nth_full
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.architecture import heads_of
from sapwood.models.lm.gemma3 import Gemma3ForCausalLM

_SPARSE_LAYERS, _SPARSITY = 10, 0.95
"""Of the models that do not say activation_sparsity_pattern, if they have more layers."""


class Gemma3nForCausalLM(Gemma3ForCausalLM):
    """Gemma 3 with several streams of hidden states, inputs to each layer, sparse gates in the
    first layers, and last layers that attend to the keys and values of earlier ones."""

    absent: ClassVar = {
        **Gemma3ForCausalLM.absent,
        "activation_sparsity_pattern": None,
        "altup_active_idx": 0,
        "altup_correct_scale": True,
        "altup_num_inputs": 4,
        "final_logit_softcapping": 30.0,
        "hidden_size": 2048,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 16_384,
        "laurel_rank": 64,
        "max_position_embeddings": 32_768,
        "num_attention_heads": 8,
        "num_hidden_layers": 35,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 15,
        "sliding_window": 512,
        "vocab_size": 262_400,
        "vocab_size_per_layer_input": 262_144,
    }

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        said = {name: value for name, value in hf.items() if value is not None}
        found = {**cls.absent, **said}
        number = integer(found, "num_hidden_layers")
        found.setdefault("layer_types", every_nth_full(number, 5))
        sizes = found["intermediate_size"]
        if isinstance(sizes, list):
            if len(sizes) != number or not all(isinstance(one, int) for one in sizes):
                raise ConfigError(
                    f"config.json must have one intermediate_size, or one for each of its {number} "
                    f"layers, got {sizes!r}"
                )
            found["sizes_of_layers"], found["intermediate_size"] = sizes, max(sizes)
        usual = _SPARSE_LAYERS if number > _SPARSE_LAYERS else 0
        pattern = found["activation_sparsity_pattern"]
        if pattern is None:
            pattern = [_SPARSITY] * usual + [0.0] * (number - usual)
        if (
            not isinstance(pattern, list)
            or len(pattern) != number
            or not all(isinstance(one, int | float) and 0 <= one < 1 for one in pattern)
        ):
            raise ConfigError(
                f"config.json must have a share for each of its {number} layers in "
                f"'activation_sparsity_pattern', got {pattern!r}"
            )
        found["activation_sparsity_pattern"] = pattern
        return super().understood(found)

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        found, number = config.hf, config.num_layers
        sources = kv_sources(found["layer_types"], integer(found, "num_kv_shared_layers"))
        streams, active = (
            integer(found, name) for name in ("altup_num_inputs", "altup_active_idx")
        )
        if not 0 <= active < streams:
            raise ConfigError(
                f"config.json has altup_active_idx {active}, but altup_num_inputs {streams}"
            )
        return replace(
            config,
            heads_by_layer=tuple(
                AttentionHeads(
                    num_heads=config.num_heads,
                    num_kv_heads=config.num_kv_heads,
                    head_dim=config.head_dim,
                    source=source,
                )
                for source in sources
            ),
            intermediate_sizes=tuple(found.get("sizes_of_layers", ())),
            other_parameters=per_layer_parameters(config)
            + 2 * (streams - 1) * config.hidden_size**2
            + number * 2 * config.hidden_size * integer(found, "laurel_rank"),
        )

    def norm(self, size: int | None = None) -> RMSNorm:
        return self.rms_norm(size)

    def streams(self) -> Streams:
        return AltUpStreams(self.build, self._form(), per_layer_inputs(self), self.norm())

    def _form(self) -> AltUpForm:
        config, hf = self.config, self.config.hf
        return AltUpForm(
            number=integer(hf, "altup_num_inputs"),
            active=integer(hf, "altup_active_idx"),
            hidden_size=config.hidden_size,
            input_size=integer(hf, "hidden_size_per_layer_input"),
            scales_output=switch(hf, "altup_correct_scale"),
            eps=config.norm_eps,
        )

    def layer(self, index: int) -> Layer:
        return AltUpLayer(
            self.build,
            index,
            self._form(),
            self.mixer_sublayer(index),
            self.feed_forward_sublayer(index),
            per_layer_block(self),
            rank=integer(self.config.hf, "laurel_rank"),
        )

    def mixer_sublayer(self, index: int) -> Sublayer[Mixer]:
        after = self.named_norm("post_attention_layernorm")
        return replace(super().mixer_sublayer(index), after=after)

    def feed_forward_sublayer(self, index: int) -> Sublayer[FeedForward]:
        return Sublayer(
            name=self.names.feed_forward,
            body=self.feed_forward(index),
            before=self.named_norm("pre_feedforward_layernorm"),
            after=self.named_norm("post_feedforward_layernorm"),
        )

    def mixer(self, index: int) -> Mixer:
        return unscaled_attention(self, index)

    def feed_forward(self, index: int) -> FeedForward:
        sparsity = self.config.hf["activation_sparsity_pattern"][index]
        size = self.config.intermediate_size_of(index)
        if not sparsity:
            return self.gated_mlp(size=size)
        return SparseGatedMLP(
            self.build,
            self.config.hidden_size,
            size,
            sparsity=sparsity,
            activation=Activation(self.config.activation),
        )


def unscaled_attention(model: Gemma3ForCausalLM, index: int, **details: Any) -> Mixer:
    """Attention with norms of queries, keys and values, and no factor of scores, over the layer's
    own keys and values or another's. details: other parameters of Attention"""
    config = model.config
    heads, bias = config.heads_of(index), config.attention_bias
    assert heads is not None
    if heads.source is not None:
        return SharedAttention(
            model.build,
            heads.source,
            config.hidden_size,
            heads_of(config, index),
            cos_sin=model.rotation_of(index),
            q_norm=model.rms_norm,
            scale=1.0,
            traits=model.traits(index),
            bias=bias,
        )
    return model.attention(
        index,
        scale=1.0,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=model.rms_norm,
        norms_values=True,
        **details,
    )


def kv_sources(kinds: Sequence[str], num_shared: int) -> tuple[int | None, ...]:
    """Per layer the one whose keys and values it attends to, None for its own: the last
    `num_shared` layers attend to those of the last earlier layer of their kind."""
    first = len(kinds) - num_shared
    if not 0 <= num_shared < len(kinds) or not set(kinds[:first]).issuperset(kinds):
        raise ConfigError(
            f"config.json lets {num_shared} of {len(kinds)} layers share keys and values, but each "
            "kind of layer must have one of its own before them"
        )
    last = {kind: index for index, kind in enumerate(kinds[:first])}
    return tuple(None if index < first else last[kind] for index, kind in enumerate(kinds))


def per_layer_parameters(config: DecoderConfig) -> int:
    """Weights of PerLayerInputs and of all PerLayerBlocks."""
    size = integer(config.hf, "hidden_size_per_layer_input")
    rows = integer(config.hf, "vocab_size_per_layer_input") + 3 * config.hidden_size
    return config.num_layers * size * rows


def per_layer_inputs(model: Gemma3ForCausalLM) -> PerLayerInputs:
    config = model.config
    return PerLayerInputs(
        model.build,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        size=integer(config.hf, "hidden_size_per_layer_input"),
        vocab_size=integer(config.hf, "vocab_size_per_layer_input"),
        eps=config.norm_eps,
    )


def per_layer_block(model: Gemma3ForCausalLM) -> PerLayerBlock:
    config = model.config
    return PerLayerBlock(
        model.build,
        hidden_size=config.hidden_size,
        size=integer(config.hf, "hidden_size_per_layer_input"),
        activation=Activation(config.activation),
        eps=config.norm_eps,
    )
