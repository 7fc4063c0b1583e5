"""The facts of a decoder-only language model, read from its config.json. No torch.

The class of an architecture in models/lm says what its layers are made of (biases, norms).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sapwood.base.errors import ConfigError
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.hf_fields import epsilon, integer, switch
from sapwood.schema.cache import CacheGroup, keys_and_values, within

_DEFAULT_HEAD_DIM = {"Qwen3ForCausalLM": 128}
"""Where a missing head_dim means something else than hidden_size / num_attention_heads."""

_WITHOUT_WINDOW = frozenset({"LlamaForCausalLM"})
"""Architectures that attend to everything, even if their config mentions a sliding_window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A model of `num_layers` equal decoder layers.

    architecture     the architecture's name in config.json: "LlamaForCausalLM", …
    context_length   prompt and output tokens of one request that the model is built to serve
    rms_norm_eps     added to the mean of squares
    attention_bias   the field of config.json; some architectures have biases regardless
    mlp_bias         the field of config.json; some architectures have biases regardless
    sliding_window   number of tokens that a token attends to at most in the windowed layers; None:
                     there are none
    windowed_layers  indices of these layers
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    context_length: int
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    windowed_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "context_length",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"the model's {name} is {value} but must be >= 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"the model has {self.num_heads} attention heads, which is not a multiple of its "
                f"{self.num_kv_heads} key and value heads"
            )
        self.rope.rotary_dim(self.head_dim)

    def window_of(self, layer: int) -> int | None:
        """Tokens that a token attends to in this layer; None: all of the context."""
        if self.sliding_window is None or self.sliding_window >= self.context_length:
            return None
        return self.sliding_window if layer in self.windowed_layers else None

    @property
    def has_windows(self) -> bool:
        """Whether some layer sees less than the context."""
        return any(self.window_of(layer) is not None for layer in range(self.num_layers))

    @property
    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """What tokens leave behind in the layers, for this context length."""
        parts = (
            (
                [layer for layer in range(self.num_layers) if layer not in self.windowed_layers],
                None,
            ),
            (self.windowed_layers, self.sliding_window),
        )
        groups = [
            keys_and_values(
                layers, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, window=window
            )
            for layers, window in parts
            if layers
        ]
        return within(groups, self.context_length)

    @property
    def num_parameters(self) -> int:
        """Weights of all matrices, counted once where they are tied; norms and biases are few."""
        heads = self.num_heads + self.num_kv_heads
        layer = 2 * self.hidden_size * self.head_dim * heads
        layer += 3 * self.hidden_size * self.intermediate_size
        vocab = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + vocab

    def for_context(self, context_length: int) -> DecoderConfig:
        """The same model, built to serve that context length; ConfigError if that is impossible."""
        longest = self.rope.max_context_length
        if context_length > longest:
            raise ConfigError(
                f"a context of {context_length} tokens was asked for, but the model's positions "
                f"reach {longest}; start with --context-length {longest} or less"
            )
        return replace(self, context_length=context_length)

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
        """Read config.json; ConfigError if a field is missing or its value is not implemented.

        The context length is the trained length.
        """
        architecture = _architecture(config)
        _refuse_what_is_not_implemented(config)
        num_heads = integer(config, "num_attention_heads")
        integer(config, "max_position_embeddings")
        rope = RopeConfig.from_hf(config)
        windowed = () if architecture in _WITHOUT_WINDOW else _windowed_layers(config)
        return DecoderConfig(
            architecture=architecture,
            vocab_size=integer(config, "vocab_size"),
            hidden_size=integer(config, "hidden_size"),
            intermediate_size=integer(config, "intermediate_size"),
            num_layers=integer(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=integer(config, "num_key_value_heads", default=num_heads),
            head_dim=_head_dim(config, architecture, num_heads),
            rms_norm_eps=epsilon(config, "rms_norm_eps", default=1e-6),
            rope=rope,
            context_length=rope.trained_length,
            attention_bias=switch(config, "attention_bias"),
            mlp_bias=switch(config, "mlp_bias"),
            tie_word_embeddings=switch(config, "tie_word_embeddings"),
            sliding_window=integer(config, "sliding_window") if windowed else None,
            windowed_layers=windowed,
        )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1:
        raise ConfigError(
            f"config.json must name one architecture in 'architectures', got {names!r}"
        )
    return str(names[0])


def _refuse_what_is_not_implemented(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise ConfigError(f"the config asks for activation {activation!r}; implemented: 'silu'")


def _head_dim(config: Mapping[str, Any], architecture: str, num_heads: int) -> int:
    default = _DEFAULT_HEAD_DIM.get(architecture)
    hidden_size = integer(config, "hidden_size")
    if default is None and not config.get("head_dim") and hidden_size % max(num_heads, 1):
        raise ConfigError(
            f"config.json has no head_dim, and hidden_size {hidden_size} is not a multiple of "
            f"num_attention_heads {num_heads}"
        )
    return integer(config, "head_dim", default=default or hidden_size // max(num_heads, 1))


def _windowed_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that attend to the config's sliding_window instead of everything."""
    if config.get("sliding_window") is None or not config.get("use_sliding_window", True):
        return ()
    num_layers = integer(config, "num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        # Qwen's convention: layers from max_window_layers on have the window. Others: all layers.
        return tuple(range(integer(config, "max_window_layers", default=0), num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConfigError(
            f"config.json must name a kind for each of its {num_layers} layers in 'layer_types', "
            f"got {kinds!r}"
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
