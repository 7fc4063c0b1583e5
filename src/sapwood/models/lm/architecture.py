"""What the parts of a decoder are. An architecture is a subclass that says what differs.

The base class is a pre-norm decoder with gated feed-forwards, whose names are Llama's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import (
    ALIBI,
    CHOSEN_KEYS,
    LATENT,
    PLAIN,
    SINKS,
    SLIDING_WINDOW,
    SOFT_CAP,
    AttentionTraits,
)
from sapwood.layers.attention import Attention
from sapwood.layers.build import Build
from sapwood.layers.embedding import LearnedPositions, LMHead, VocabEmbedding
from sapwood.layers.heads import SEPARATE, HeadLayout, QkvForm
from sapwood.layers.layer import FeedForward, Layer, Mixer, NamedNorm, ParallelLayer, Sublayer
from sapwood.layers.mlp import GatedMLP, PlainMLP
from sapwood.layers.norm import LayerNorm, Norm, RMSNorm
from sapwood.layers.rope_config import ROPE_BY_KIND, RopeConfig, parted_by_kind
from sapwood.layers.rotary import cos_sin_table, unrotated
from sapwood.layers.streams import Streams
from sapwood.models.config import SLIDING, DecoderConfig
from sapwood.models.drafts.head import Combination, projection
from sapwood.models.hf_fields import integer

FROM_GGUF = "gguf_projections"
"""The field of a config.json that was made of a GGUF file (store/gguf_config): whether projections
to queries, keys and values are "fused", in this order, or "separate". Its other fields are called
as DecoderConfig.from_hf knows them, and matrices are [out, in]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names of a decoder's parts in the checkpoint.

    layers  of all layers; that of one is "<layers>.<index>"
    positions, embedding_norm  of parts that most architectures do not have
    mixer, feed_forward, before_mixer, before_feed_forward  within a layer
    """

    embedding: str = "model.embed_tokens"
    positions: str = "model.embed_positions"
    embedding_norm: str = "model.embed_norm"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    mixer: str = "self_attn"
    feed_forward: str = "mlp"
    before_mixer: str = "input_layernorm"
    before_feed_forward: str = "post_attention_layernorm"

    def layer(self, index: int) -> str:
        return f"{self.layers}.{index}"


LLAMA_NAMES = Names()


class Architecture:
    """Builds the parts of one model. Each call of a method makes a new part without weights.

    Raises ConfigError if the ranks cannot have equal parts, or sizes do not fit the scheme."""

    absent: ClassVar[Mapping[str, Any]] = {}
    """Fields of config.json -> what it means here if they are absent or null."""
    spelled: ClassVar[Mapping[str, str | tuple[str, ...]]] = {}
    """Fields as DecoderConfig.from_hf knows them -> their names in this architecture's files; of
    several names the first that is there."""
    has_gates: ClassVar[bool] = True
    """Whether feed-forwards have a gate."""
    has_windows: ClassVar[bool] = True
    """Whether a sliding_window in config.json counts."""
    can_be_rescaled: ClassVar[bool] = True
    """Whether a conversion may move factors from norms to the layers after them: not if a norm's
    weight is not what the inputs are multiplied by, or if other norms come in between."""
    shares_weights: ClassVar[bool] = False
    """Whether several layers have weights in common."""
    names: ClassVar[Names] = LLAMA_NAMES
    lacks_prefix: ClassVar[str] = ""
    """The beginning of most names that some of the architecture's checkpoints leave out."""
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
        self._tables: dict[tuple[RopeConfig, int], Tensor] = {}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        """The facts in config.json; ConfigError for what is missing or not implemented."""
        found = DecoderConfig.from_hf(parted_by_kind(cls.understood(hf)))
        return replace(found, is_gated=cls.has_gates)

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """config.json in the usual spelling, with nothing left out that has a value here."""
        found = {name: value for name, value in hf.items() if value is not None}
        spelled = {} if FROM_GGUF in found else cls.spelled
        for ours, theirs in spelled.items():
            names = (theirs,) if isinstance(theirs, str) else theirs
            values = [found[name] for name in names if name in found]
            found.pop(ours, None)
            if values:
                found[ours] = values[0]
        if not cls.has_windows:
            found.pop("sliding_window", None)
        return {**cls.absent, **found}

    @property
    def is_from_gguf(self) -> bool:
        return FROM_GGUF in self.config.hf

    @classmethod
    def with_predictor(cls, config: DecoderConfig) -> DecoderConfig | None:
        """The model with one layer more, the one by which its checkpoint predicts further tokens;
        None: it has no such layer, or it is not implemented."""
        return None

    def predictor(self) -> Combination:
        """The draft head whose layer is the last of `with_predictor`'s model, which this is."""
        raise NotImplementedError(f"{self.config.architecture} has no with_predictor")

    @classmethod
    def with_predictors(cls, config: DecoderConfig) -> DecoderConfig | None:
        """The model with several layers more, by each of which its checkpoint predicts the token
        that is one further than the layer before does, all from the model's states before its last
        norm; None: as above."""
        return None

    def predictors(self) -> list[Combination]:
        """The draft heads of `with_predictors`' model, which this is, in the order of tokens."""
        raise NotImplementedError(f"{self.config.architecture} has no with_predictors")

    def rebuilt(self, build: Build) -> Architecture:
        """The same architecture for another build on the same device."""
        found = type(self)(self.config, build)
        found._tables = self._tables
        return found

    @classmethod
    def checkpoint_name(cls, name: str) -> str:
        """The name in the model's targets of a checkpoint's tensor."""
        prefix = cls.lacks_prefix
        return name if name.startswith((prefix, f"{cls.names.head}.")) else f"{prefix}{name}"

    # The parts.

    def positions(self) -> LearnedPositions | None:
        """What is added to the embedding of a token by its position."""
        return None

    def embedding_norm(self) -> Norm | None:
        """The norm before the first layer."""
        return None

    def embedding(self, *, scale: float = 1.0) -> VocabEmbedding:
        """scale: as in VocabEmbedding"""
        config = self.config
        return VocabEmbedding(self.build, config.vocab_size, config.hidden_size, scale=scale)

    def streams(self) -> Streams | None:
        """What goes through the layers, and its last norm; None: hidden states, and `norm`."""
        return None

    def layer(self, index: int) -> Layer:
        """x + mixer(norm(x)), then x + feed_forward(norm(x)); what is added may be scaled."""
        return Layer(self.mixer_sublayer(index), self.feed_forward_sublayer(index))

    def parallel_layer(self, index: int, *, shares_norm: bool = True) -> Layer:
        """x + mixer(norm(x)) + feed_forward(norm(x)), with one norm for both or with two."""
        mixer, feed_forward = self.mixer_sublayer(index), self.feed_forward_sublayer(index)
        before = None if shares_norm else feed_forward.before
        return ParallelLayer(mixer, replace(feed_forward, before=before))

    def mixer_sublayer(self, index: int) -> Sublayer[Mixer]:
        names = self.names
        return Sublayer(
            name=names.mixer,
            body=self.mixer(index),
            before=self.named_norm(names.before_mixer),
            scale=self.residual_scale,
        )

    def feed_forward_sublayer(self, index: int) -> Sublayer[FeedForward]:
        names = self.names
        return Sublayer(
            name=names.feed_forward,
            body=self.feed_forward(index),
            before=self.named_norm(names.before_feed_forward),
            scale=self.residual_scale,
        )

    def mixer(self, index: int) -> Mixer:
        return self.attention(index)

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp()

    def norm(self, size: int | None = None) -> Norm:
        """A norm over `size` entries, by default of hidden states."""
        return self.rms_norm(size)

    def head(self, tied: VocabEmbedding | None, **details: Any) -> LMHead:
        """The output layer.

        tied     the embedding whose weight it shares
        details  other parameters of LMHead"""
        config = self.config
        return LMHead(self.build, config.vocab_size, config.hidden_size, tied=tied, **details)

    # What the parts are usually made of.

    def attention(self, index: int, **details: Any) -> Attention:
        """The layer's attention, with rotation and the traits that the config says.

        details  other parameters of Attention"""
        config = self.config
        usual: dict[str, Any] = {
            "cos_sin": self.rotation_of(index),
            "traits": self.traits(index),
            "chunk": config.window_of(index) if config.has_chunks else None,
            "sinks": config.has_sinks,
            "eps": config.norm_eps,
        }
        details = {**usual, **details, "form": self._stored(details.get("form", SEPARATE))}
        heads = heads_of(config, index)
        return Attention(self.build, index, config.hidden_size, heads, **details)

    def _stored(self, form: QkvForm) -> QkvForm:
        """`form` as the checkpoint at hand has it, which may be made of a GGUF file."""
        if not self.is_from_gguf:
            return form
        if self.config.hf[FROM_GGUF] == "separate":
            form = replace(form, fused=None)
        return replace(form, grouped=False, transposed=False)

    def gated_mlp(
        self, *, bias: bool = False, size: int = 0, build: Build | None = None, **details: Any
    ) -> GatedMLP:
        """size: the intermediate size, 0 for the config's; build: None for that of most layers;
        details: other parameters of GatedMLP"""
        config = self.config
        return GatedMLP(
            build or self.build,
            config.hidden_size,
            size or config.intermediate_size,
            activation=Activation(config.activation),
            bias=bias,
            **details,
        )

    def rms_norm(self, size: int | None = None, *, adds_one: bool = False) -> RMSNorm:
        size = size or self.config.hidden_size
        return RMSNorm(self.build, size, eps=self.config.norm_eps, adds_one=adds_one)

    def plain_mlp(
        self,
        up: str,
        down: str,
        *,
        bias: bool,
        transposed: bool = False,
        size: int = 0,
        build: Build | None = None,
    ) -> PlainMLP:
        """A feed-forward without a gate, whose layers have these names; size and build: as in
        gated_mlp."""
        config = self.config
        return PlainMLP(
            build or self.build,
            config.hidden_size,
            size or config.intermediate_size,
            activation=Activation(config.activation),
            bias=bias,
            names=(up, down),
            transposed=transposed and not self.is_from_gguf,
        )

    def layer_norm(
        self, size: int | None = None, *, bias: bool = True, **details: Any
    ) -> LayerNorm:
        """details: other parameters of LayerNorm"""
        size = size or self.config.hidden_size
        return LayerNorm(self.build, size, eps=self.config.norm_eps, bias=bias, **details)

    def next_layer(self, *, norm: str) -> Combination:
        """A predictor as DeepSeek has it, in a layer after the last one.

        norm  name of the norm of its outcome, within the layer"""
        index, size = self.config.num_layers - 1, self.config.hidden_size
        prefix = self.names.layer(index)
        return Combination(
            projection=projection(self.build, f"{prefix}.eh_proj", 2 * size, size, bias=False),
            embedding_norm=self.named_norm(f"{prefix}.enorm"),
            state_norm=self.named_norm(f"{prefix}.hnorm"),
            layers={prefix: self.layer(index)},
            norm=self.named_norm(f"{prefix}.{norm}"),
        )

    def mtp_layer(self) -> Combination:
        """A predictor as Qwen has it, beside the model."""
        size = self.config.hidden_size
        return Combination(
            projection=projection(self.build, "mtp.fc", 2 * size, size, bias=False),
            embedding_norm=self.named_norm("mtp.pre_fc_norm_embedding"),
            state_norm=self.named_norm("mtp.pre_fc_norm_hidden"),
            layers={"mtp.layers.0": self.layer(self.config.num_layers - 1)},
            norm=self.named_norm("mtp.norm"),
        )

    def named_norm(self, name: str, size: int | None = None) -> NamedNorm:
        return NamedNorm(name, self.norm(size))

    def traits(self, index: int) -> AttentionTraits:
        config, soft_cap = self.config, self.config.soft_cap
        window = None if config.has_chunks else config.window_of(index)
        if window is None and soft_cap is None:
            return PLAIN
        return AttentionTraits(window=window, soft_cap=soft_cap)

    def rope_of(self, index: int) -> RopeConfig | None:
        """The rotary embedding of a layer's attention; None: it rotates nothing."""
        return self.config.rope

    def rope_of_windows(self, otherwise: Mapping[str, Any]) -> RopeConfig:
        """The rotary embedding of layers with a window, if config.json has one for each kind of
        layer; else what `otherwise` says as rope_parameters."""
        said = self.config.hf.get(ROPE_BY_KIND, {}).get(SLIDING, otherwise)
        return RopeConfig.from_hf({**self.config.hf, "rope_scaling": None, "rope_parameters": said})

    def unrotated(self) -> Tensor:
        return unrotated(self.config.context_length, self.build.device)

    def rotation_of(self, index: int) -> Tensor:
        """The table of cosines and sines of a layer's attention."""
        rope = self.rope_of(index)
        if rope is None:
            return self.unrotated()
        return self.cos_sin(rope, heads_of(self.config, index).head_dim)

    def cos_sin(self, rope: RopeConfig, head_dim: int = 0) -> Tensor:
        """The table of cosines and sines, which all layers with such heads share; head_dim 0: the
        config's."""
        head_dim = head_dim or self.config.head_dim
        key = rope, head_dim
        if key not in self._tables:
            self._tables[key] = cos_sin_table(
                rope,
                head_dim=head_dim,
                context_length=self.config.context_length,
                device=self.build.device,
            )
        return self._tables[key]


def one_layer_more(config: DecoderConfig, *, count_field: str) -> DecoderConfig | None:
    """The config with another layer of the usual kind; None unless a field of config.json says that
    the checkpoint has one to predict further tokens."""
    if integer(config.hf, count_field, default=0) < 1:
        return None
    return replace(config, num_layers=config.num_layers + 1)


def heads_of(config: DecoderConfig, layer: int) -> HeadLayout:
    """The heads of a layer that has attention."""
    heads = config.heads_of(layer)
    assert heads is not None, f"layer {layer} has no attention"
    return HeadLayout(
        num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim
    )


def attention_features(config: DecoderConfig) -> frozenset[str]:
    """What the model's attention needs of kernels, as `Need.attention` has it."""
    windows = any(config.window_of(layer) for layer in range(config.num_layers))
    there = {
        SLIDING_WINDOW: windows and not config.has_chunks,
        SOFT_CAP: config.soft_cap is not None,
        SINKS: config.has_sinks,
        ALIBI: config.has_alibi,
        LATENT: config.latent is not None,
        CHOSEN_KEYS: config.index_width > 0,
    }
    return frozenset(name for name, is_there in there.items() if is_there)
