"""What the parts of a decoder are. An architecture is a subclass that says what differs.

The base class is a pre-norm decoder with gated feed-forwards, whose names are Llama's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.interface import PLAIN, SINKS, SLIDING_WINDOW, SOFT_CAP, AttentionTraits
from sapwood.layers.attention import Attention, HeadLayout
from sapwood.layers.build import Build
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.layer import FeedForward, Layer, Mixer, NamedNorm, Sublayer
from sapwood.layers.mlp import GatedMLP
from sapwood.layers.norm import LayerNorm, Norm, RMSNorm
from sapwood.layers.rope_config import RopeConfig
from sapwood.layers.rotary import cos_sin_table
from sapwood.models.config import DecoderConfig


class Architecture:
    """Builds the parts of one model. Each call of a method makes a new part without weights.

    Raises ConfigError if the ranks cannot have equal parts, or sizes do not fit the scheme."""

    absent: ClassVar[Mapping[str, Any]] = {}
    """Fields of config.json -> what it means here if they are absent or null."""
    spelled: ClassVar[Mapping[str, str]] = {}
    """Fields as DecoderConfig.from_hf knows them -> their names in this architecture's files."""
    has_windows: ClassVar[bool] = True
    """Whether a sliding_window in config.json counts."""
    can_be_rescaled: ClassVar[bool] = True
    """Whether a conversion may move factors from norms to the layers after them: not if a norm's
    weight is not what the inputs are multiplied by, or if other norms come in between."""
    feed_forward_name: ClassVar[str] = "mlp"
    """Of a layer's feed-forward, in the checkpoint."""
    ignorable: ClassVar[tuple[str, ...]] = (
        "*.rotary_emb.inv_freq",
        "*.self_attn.[kv]_scale",  # of a calibrated 8-bit KV cache; ours makes a scale per token
    )
    """Patterns of checkpoint tensors that are not parameters of the model."""
    ignorable_when_tied: ClassVar[tuple[str, ...]] = ("lm_head.weight",)
    """Patterns of tensors that are superfluous when the embedding is the output layer too."""

    def __init__(self, config: DecoderConfig, build: Build) -> None:
        self.config = config
        self.build = build
        self.residual_scale = 1.0
        """Factor of what a mixer or feed-forward adds."""
        self._tables: dict[RopeConfig, Tensor] = {}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        """The facts in config.json; ConfigError for what is missing or not implemented."""
        return DecoderConfig.from_hf(cls.understood(hf))

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """config.json in the usual spelling, with nothing left out that has a value here."""
        found = {name: value for name, value in hf.items() if value is not None}
        for ours, theirs in cls.spelled.items():
            found.pop(ours, None)
            if theirs in found:
                found[ours] = found[theirs]
        if not cls.has_windows:
            found.pop("sliding_window", None)
        return {**cls.absent, **found}

    def rebuilt(self, build: Build) -> Architecture:
        """The same architecture for another build on the same device."""
        found = type(self)(self.config, build)
        found._tables = self._tables
        return found

    # The parts.

    def embedding(self, *, scale: float = 1.0) -> VocabEmbedding:
        """scale: as in VocabEmbedding"""
        config = self.config
        return VocabEmbedding(self.build, config.vocab_size, config.hidden_size, scale=scale)

    def layer(self, index: int) -> Layer:
        """x + mixer(norm(x)), then x + feed_forward(norm(x)); what is added may be scaled."""
        return Layer(
            Sublayer(
                name="self_attn",
                body=self.mixer(index),
                before=self.named_norm("input_layernorm"),
                scale=self.residual_scale,
            ),
            Sublayer(
                name=self.feed_forward_name,
                body=self.feed_forward(index),
                before=self.named_norm("post_attention_layernorm"),
                scale=self.residual_scale,
            ),
        )

    def mixer(self, index: int) -> Mixer:
        return self.attention(index)

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp()

    def norm(self, size: int | None = None) -> Norm:
        """A norm over `size` entries, by default of hidden states."""
        return self.rms_norm(size)

    def head(
        self, tied: VocabEmbedding | None, *, scale: float = 1.0, soft_cap: float | None = None
    ) -> LMHead:
        """The output layer; `tied`: the embedding whose weight it shares; others as in LMHead."""
        return LMHead(
            self.build,
            self.config.vocab_size,
            self.config.hidden_size,
            tied=tied,
            scale=scale,
            soft_cap=soft_cap,
        )

    # What the parts are usually made of.

    def attention(self, index: int, **details: Any) -> Attention:
        """The layer's attention, with rotation and the traits that the config says.

        details  other parameters of Attention"""
        config = self.config
        usual: dict[str, Any] = {
            "cos_sin": self.cos_sin(config.rope),
            "traits": self.traits(index),
            "sinks": config.has_sinks,
        }
        return Attention(
            self.build, index, config.hidden_size, heads_of(config), **{**usual, **details}
        )

    def gated_mlp(self, *, bias: bool = False, size: int = 0, **details: Any) -> GatedMLP:
        """size: the intermediate size, 0 for the config's; details: other parameters of GatedMLP"""
        config = self.config
        return GatedMLP(
            self.build,
            config.hidden_size,
            size or config.intermediate_size,
            activation=Activation(config.activation),
            bias=bias,
            **details,
        )

    def rms_norm(self, size: int | None = None, *, adds_one: bool = False) -> RMSNorm:
        size = size or self.config.hidden_size
        return RMSNorm(self.build, size, eps=self.config.norm_eps, adds_one=adds_one)

    def layer_norm(self, size: int | None = None, *, bias: bool = True) -> LayerNorm:
        size = size or self.config.hidden_size
        return LayerNorm(self.build, size, eps=self.config.norm_eps, bias=bias)

    def named_norm(self, name: str) -> NamedNorm:
        return NamedNorm(name, self.norm())

    def traits(self, index: int) -> AttentionTraits:
        window, soft_cap = self.config.window_of(index), self.config.soft_cap
        if window is None and soft_cap is None:
            return PLAIN
        return AttentionTraits(window=window, soft_cap=soft_cap)

    def cos_sin(self, rope: RopeConfig) -> Tensor:
        """The table of cosines and sines, which all layers with this embedding share."""
        if rope not in self._tables:
            self._tables[rope] = cos_sin_table(
                rope,
                head_dim=self.config.head_dim,
                context_length=self.config.context_length,
                device=self.build.device,
            )
        return self._tables[rope]


def heads_of(config: DecoderConfig) -> HeadLayout:
    return HeadLayout(
        num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim
    )


def attention_features(config: DecoderConfig) -> frozenset[str]:
    """What the model's attention needs of kernels, as `Need.attention` has it."""
    windows = any(config.window_of(layer) for layer in range(config.num_layers))
    there = {
        SLIDING_WINDOW: windows,
        SOFT_CAP: config.soft_cap is not None,
        SINKS: config.has_sinks,
    }
    return frozenset(name for name, is_there in there.items() if is_there)
