"""The facts of an encoder of the BERT family, read from its config.json. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sapwood.base.errors import ConfigError
from sapwood.models.hf_fields import activation, epsilon, integer


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """A model of `num_layers` equal layers, whose tokens attend to all others of their text.

    architecture     the architecture's name in config.json: "BertModel", …
    activation       a value of kernels/activations.Activation
    num_positions    tokens for which there are learned positions
    first_position   index of the first token's position
    num_types        number of texts in one input that the model tells apart; 1: it does not
    context_length   tokens of one request that the model is built to serve
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    layer_norm_eps: float
    activation: str
    num_positions: int
    first_position: int
    num_types: int
    context_length: int

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"the model's {name} is {getattr(self, name)} but must be >= 1")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_heads}"
            )
        if not 1 < self.context_length <= self.num_positions:
            raise ConfigError(
                f"a context of {self.context_length} tokens was asked for, but the model's "
                f"positions reach {self.num_positions}; start with --context-length "
                f"{self.num_positions} or less"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def num_parameters(self) -> int:
        """Weights of all matrices; norms and biases are few."""
        layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        tables = (self.vocab_size + self.num_positions + self.num_types) * self.hidden_size
        return self.num_layers * layer + tables

    def for_context(self, context_length: int) -> EncoderConfig:
        """The same model, built to serve that context length; ConfigError if that is impossible."""
        return replace(self, context_length=context_length)

    @staticmethod
    def from_hf(
        config: Mapping[str, Any], *, first_position: int = 0, max_tokens: int | None = None
    ) -> EncoderConfig:
        """Read config.json; ConfigError if a field is missing or its value is not implemented.

        first_position  index of the first token's position; those before are unused
        max_tokens  tokens of the longest text that the model was made for; None: its positions say
        """
        architecture = str(next(iter(config.get("architectures") or []), ""))
        _refuse_what_is_not_implemented(config)
        positions = integer(config, "max_position_embeddings") - first_position
        return EncoderConfig(
            architecture=architecture,
            vocab_size=integer(config, "vocab_size"),
            hidden_size=integer(config, "hidden_size"),
            intermediate_size=integer(config, "intermediate_size"),
            num_layers=integer(config, "num_hidden_layers"),
            num_heads=integer(config, "num_attention_heads"),
            layer_norm_eps=epsilon(config, "layer_norm_eps", default=1e-12),
            activation=activation(config, "hidden_act", default="gelu"),
            num_positions=positions,
            first_position=first_position,
            num_types=max(int(config.get("type_vocab_size") or 0), 1),
            context_length=min(max_tokens or positions, positions),
        )


def _refuse_what_is_not_implemented(config: Mapping[str, Any]) -> None:
    kind = config.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise ConfigError(f"the config asks for {kind!r} positions; implemented: 'absolute'")
    if config.get("is_decoder"):
        raise ConfigError("the config makes a decoder of an encoder, which is not implemented")
    if config.get("quantization_config"):
        raise ConfigError(
            "the checkpoint's weights are quantised, which is not implemented for encoders; use "
            "the model's unquantised checkpoint"
        )
