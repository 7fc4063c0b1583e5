"""The facts of a decoder-only language model, read from its config.json. No torch.

The class of an architecture in models/lm says what its layers are made of (biases, norms), and how
it spells config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sapwood.base.errors import ConfigError
from sapwood.kernels.latent import LatentSizes
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.hf_fields import activation, epsilon, integer, switch
from sapwood.schema.cache import CacheGroup, keys_and_values, latent_rows, within

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers in config.json's layer_types."""

MAX_LAYERS = 10_000
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """The feed-forward layers of a mixture of experts.

    num_experts        experts of each layer, without those that every token has
    num_per_token      of these experts, those that compute a token
    intermediate_size  of each expert
    shared_size        intermediate size of the experts that every token has, together; 0: none
    dense_layers       indices of the layers whose feed-forward is dense all the same
    num_identity       further experts that give what they take; routers choose them, too
    """

    num_experts: int
    num_per_token: int
    intermediate_size: int
    shared_size: int = 0
    dense_layers: tuple[int, ...] = ()
    num_identity: int = 0

    def __post_init__(self) -> None:
        num_routed = self.num_experts + max(0, self.num_identity)
        if not 1 <= self.num_per_token <= num_routed or self.intermediate_size < 1:
            raise ConfigError(
                f"the model has {self.num_experts} experts of size {self.intermediate_size}, of "
                f"which {self.num_per_token} compute each token; these numbers do not fit"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionHeads:
    """The heads of one layer's attention, as HeadLayout has them.

    source  index of the layer whose keys and values the layer attends to, and which keeps them;
            None: its own
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    source: int | None = None

    def __post_init__(self) -> None:
        if min(self.num_heads, self.num_kv_heads, self.head_dim) < 1:
            raise ConfigError(f"a layer of the model has impossible heads: {self}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"the model has {self.num_heads} attention heads, which is not a multiple of its "
                f"{self.num_kv_heads} key and value heads"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A model of `num_layers` decoder layers.

    architecture     the architecture's name in config.json: "LlamaForCausalLM", …
    context_length   prompt and output tokens of one request that the model is built to serve
    norm_eps         added to the mean of squares
    attention_bias   the field of config.json; some architectures have biases regardless
    mlp_bias         the field of config.json; some architectures have biases regardless
    activation       of feed-forward layers, a value of kernels/activations.Activation
    is_gated         whether feed-forward layers have a gate
    sliding_window   number of tokens that a token attends to at most in the windowed layers; None:
                     there are no such layers
    windowed_layers  indices of the layers that attend to the sliding window only
    has_chunks       whether a token of these layers sees, of the last sliding_window tokens, only
                     those of its own chunk of so many (layers/chunks)
    has_sinks        whether attention has sinks (AttentionTraits)
    soft_cap         the cap of attention scores (AttentionTraits); None: there is none
    has_alibi        whether attention adds a distance times a slope to its scores
    experts          of feed-forward layers; None: these are dense
    latent           the heads of attention over latent rows, in all layers with attention; None:
                     attention keeps keys and values
    attentions_per_layer  of a model with latent rows; attention `at` of a layer has the cache of
                     index layer * attentions_per_layer + at
    index_layers     indices of the layers with latent rows that keep another row for an indexer
    index_width      entries of that row
    states           what the layers without attention keep, in cache groups of kind STATE
    state_layer_parameters  weights of the mixer of one of these layers
    heads_by_layer   of a model whose layers differ: the heads of each, None for a layer without
                     attention; empty: all layers have the model's
    intermediate_sizes  of a model whose layers differ: the intermediate size of each, 0 for a
                     layer without a feed-forward; empty: all layers have the model's
    other_parameters  weights of matrices that are in no layer and not the vocabulary's
    hf               config.json itself, in which an architecture finds what only it has
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    context_length: int
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    activation: str = "silu"
    is_gated: bool = True
    sliding_window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    has_chunks: bool = False
    soft_cap: float | None = None
    has_sinks: bool = False
    has_alibi: bool = False
    experts: ExpertsConfig | None = None
    latent: LatentSizes | None = None
    attentions_per_layer: int = 1
    index_layers: tuple[int, ...] = ()
    index_width: int = 0
    states: tuple[CacheGroup, ...] = ()
    state_layer_parameters: int = 0
    heads_by_layer: tuple[AttentionHeads | None, ...] = ()
    intermediate_sizes: tuple[int, ...] = ()
    other_parameters: int = 0
    hf: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

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
        if not any(self.heads_of(layer) for layer in range(self.num_layers)) and not self.states:
            raise ConfigError("the model has no layer with attention, which is not implemented")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(
                f"the model's sliding_window is {self.sliding_window} but must be >= 1"
            )
        self.rope.rotary_dim(self.head_dim)

    @property
    def max_context_length(self) -> int:
        """The longest context length that `for_context` accepts."""
        return self.rope.max_context_length

    @property
    def switch_length(self) -> int | None:
        """As RopeConfig.switch_length, for this context length."""
        return self.rope.switch_length(self.context_length)

    def window_of(self, layer: int) -> int | None:
        """The layer's window; None if it sees the whole context that the model is built for."""
        if self.sliding_window is None or self.sliding_window >= self.context_length:
            return None
        return self.sliding_window if layer in self.windowed_layers else None

    @property
    def has_windows(self) -> bool:
        """Whether some layer sees less than the context."""
        return any(self.window_of(layer) is not None for layer in range(self.num_layers))

    def heads_of(self, layer: int) -> AttentionHeads | None:
        """The heads of the layer's attention; None if it has none."""
        if self.heads_by_layer:
            return self.heads_by_layer[layer]
        if layer in self.layers_with_states:
            return None
        return AttentionHeads(
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim
        )

    def intermediate_size_of(self, layer: int) -> int:
        return self.intermediate_sizes[layer] if self.intermediate_sizes else self.intermediate_size

    @property
    def largest_head_dim(self) -> int:
        """Of all layers, for the choice of kernels."""
        if self.latent is not None:
            return self.latent.expanded_dim
        heads = [self.heads_of(layer) for layer in range(self.num_layers)]
        return max((one.head_dim for one in heads if one is not None), default=self.head_dim)

    @property
    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """What tokens leave behind in the layers, for this context length."""
        if self.latent is not None:
            each = range(self.attentions_per_layer)
            layers = [
                layer * len(each) + at
                for layer in range(self.num_layers)
                if self.heads_of(layer)
                for at in each
            ]
            indexed = [layer for layer in layers if layer in self.index_layers]
            others = [layer for layer in layers if layer not in self.index_layers]
            row = self.latent.row
            groups = [latent_rows(others, width=row)] if others else []
            if indexed:
                groups.append(latent_rows(indexed, width=row, index_width=self.index_width))
            return (*groups, *self.states)
        alike: dict[tuple[bool, int, int], list[int]] = {}
        for layer in range(self.num_layers):
            heads = self.heads_of(layer)
            if heads is not None and heads.source is None:
                is_windowed = layer in self.windowed_layers
                key = (is_windowed, heads.num_kv_heads, heads.head_dim)
                alike.setdefault(key, []).append(layer)
        groups = [
            keys_and_values(
                layers,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                window=self.sliding_window if is_windowed else None,
            )
            for (is_windowed, num_kv_heads, head_dim), layers in sorted(
                alike.items(), key=lambda item: item[0][0]
            )
        ]
        return within([*groups, *self.states], self.context_length)

    @property
    def layers_with_states(self) -> tuple[int, ...]:
        """Indices of the layers that keep a state instead of keys and values."""
        return tuple(layer for group in self.states for layer in group.layers)

    @property
    def expert_layers(self) -> list[int]:
        """Indices of the layers that have experts."""
        if self.experts is None:
            return []
        return [at for at in range(self.num_layers) if at not in self.experts.dense_layers]

    @property
    def num_caches(self) -> int:
        """Numbers that cache groups call layers by: one per layer, and more in a model whose layers
        have states beside keys and values, or several attentions."""
        last = (max(group.layers) for group in self.cache_groups)
        return max(self.num_layers, 1 + max(last, default=0))

    def caches_of(self, layers: range) -> frozenset[int]:
        """The numbers that cache groups call these layers by."""
        each = self.attentions_per_layer
        others = self.num_layers * each  # the states of layers that have keys and values too

        def layer_of(number: int) -> int:
            return number // each if number < others else number - others

        numbers = (number for group in self.cache_groups for number in group.layers)
        return frozenset(number for number in numbers if layer_of(number) in layers)

    @property
    def num_parameters(self) -> int:
        """Weights of all matrices, counted once where they are tied; norms and biases are few."""
        mixers = len(self.layers_with_states) * self.state_layer_parameters
        matrices = self.hidden_size * (3 if self.is_gated else 2)
        feed_forwards = 0
        for layer in range(self.num_layers):
            heads = self.heads_of(layer)
            if heads is not None and self.latent is not None:
                mixers += self.attentions_per_layer * self.latent.num_parameters(self.hidden_size)
            elif heads is not None:
                own = heads.num_heads + (heads.num_kv_heads if heads.source is None else 0)
                mixers += 2 * self.hidden_size * heads.head_dim * own
            if self.experts is None or layer in self.experts.dense_layers:
                feed_forwards += matrices * self.intermediate_size_of(layer)
        if self.experts is not None:
            experts = self.experts
            mixture = experts.num_experts * (
                matrices * experts.intermediate_size + self.hidden_size
            )
            mixture += matrices * experts.shared_size
            feed_forwards += (self.num_layers - len(experts.dense_layers)) * mixture
        vocab = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return mixers + feed_forwards + vocab + self.other_parameters

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
        """Read config.json as most architectures mean it; an architecture's `read` knows better.

        The context length is the trained length. Raises ConfigError if a field is missing or its
        value is not implemented."""
        num_heads = integer(config, "num_attention_heads")
        num_layers = integer(config, "num_hidden_layers")
        integer(config, "max_position_embeddings")
        rope = RopeConfig.from_hf(config)
        windowed = _windowed_layers(config, num_layers)
        return DecoderConfig(
            architecture=architecture_of(config),
            vocab_size=integer(config, "vocab_size"),
            hidden_size=integer(config, "hidden_size"),
            intermediate_size=integer(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=integer(config, "num_key_value_heads", default=num_heads),
            head_dim=_head_dim(config, num_heads),
            norm_eps=epsilon(config, "rms_norm_eps", default=1e-6),
            rope=rope,
            context_length=rope.trained_length,
            attention_bias=switch(config, "attention_bias"),
            mlp_bias=switch(config, "mlp_bias"),
            tie_word_embeddings=switch(config, "tie_word_embeddings"),
            activation=activation(config, "hidden_act", default="silu"),
            sliding_window=integer(config, "sliding_window") if windowed else None,
            windowed_layers=windowed,
            hf=config,
        )


def architecture_of(config: Mapping[str, Any]) -> str:
    """The architecture that config.json names; ConfigError unless it names one."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1:
        raise ConfigError(
            f"config.json must name one architecture in 'architectures', got {names!r}"
        )
    return str(names[0])


def refuse_absurd_layers(config: Mapping[str, Any]) -> None:
    """ConfigError, before anything is made for each layer, if there are more than any model has."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        for name in _LAYER_COUNTS:
            count = part.get(name)
            if isinstance(count, int) and count > MAX_LAYERS:
                raise ConfigError(
                    f"{name} is {count}, but models have at most {MAX_LAYERS} layers; is "
                    "config.json damaged? Download the model again"
                )


def every_nth_full(num_layers: int, n: int) -> list[str]:
    """layer_types in which each n-th layer sees everything, and the others their window."""
    return [FULL if n and (index + 1) % n == 0 else SLIDING for index in range(num_layers)]


def _head_dim(config: Mapping[str, Any], num_heads: int) -> int:
    hidden_size = integer(config, "hidden_size")
    if not config.get("head_dim") and hidden_size % max(num_heads, 1):
        raise ConfigError(
            f"config.json has no head_dim, and hidden_size {hidden_size} is not a multiple of "
            f"num_attention_heads {num_heads}"
        )
    return integer(config, "head_dim", default=hidden_size // max(num_heads, 1))


def _windowed_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The layers that attend to the config's sliding_window instead of everything."""
    if config.get("sliding_window") is None or not config.get("use_sliding_window", True):
        return ()
    kinds = config.get("layer_types")
    if kinds is None:
        # Qwen's convention: layers from max_window_layers on have the window. Others: all layers.
        return tuple(range(integer(config, "max_window_layers", default=0), num_layers))
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or not {FULL, SLIDING}.issuperset(map(str, kinds))
    ):
        raise ConfigError(
            f"config.json must have {FULL} or {SLIDING} for each of its {num_layers} layers in "
            f"'layer_types', got {kinds!r}"
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == SLIDING)
