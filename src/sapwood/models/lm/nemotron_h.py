"""Nemotron H. Source: NVIDIA 2025, arXiv:2504.03624."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.experts import Latent
from sapwood.layers.layer import FeedForward, Layer, Mixer, PartialLayer
from sapwood.layers.mamba2 import Mamba2
from sapwood.models.config import FULL, DecoderConfig, ExpertsConfig
from sapwood.models.drafts.head import Combination, projection
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.architecture import Architecture, Names
from sapwood.models.lm.grouped_mixture import GroupedMixture
from sapwood.models.lm.state_space import LINEAR, Mamba2Fields, dt_range, kinds_of, with_states

MLP, MOE = "mlp", "moe"
LETTERS = {"M": LINEAR, "*": FULL, "-": MLP, "E": MOE}
"""Kinds of layers in hybrid_override_pattern."""
FIELDS = Mamba2Fields(
    heads=("mamba_num_heads", 128),
    head_dim=("mamba_head_dim", 64),
    groups=("n_groups", 8),
    state_size=("ssm_state_size", 128),
    length=("conv_kernel", 4),
    expand=("expand", 2),
)


class NemotronHForCausalLM(GroupedMixture):
    """Each layer is one of Mamba 2, attention without positions, a feed-forward of squared ReLU
    without gates, and experts that are such feed-forwards. The layers that predict further tokens
    are used for drafts alone."""

    absent: ClassVar = {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "relu2",
        "use_conv_bias": True,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
    }
    spelled: ClassVar = {
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "mlp_hidden_act",
        "head_dim": ("head_dim", "attention_head_dim"),
        "n_groups": ("n_groups", "mamba_n_groups"),
        "conv_kernel": ("conv_kernel", "mamba_d_conv"),
        "use_conv_bias": ("use_conv_bias", "mamba_conv_bias"),
        "time_step_limit": ("time_step_limit", "mamba_dt_limit"),
    }
    ignorable = (*Architecture.ignorable, "mtp.*")
    has_gates = False
    has_windows = False
    can_be_rescaled = False
    names = Names(
        embedding="model.embeddings",
        layers="model.layers",
        norm="model.norm_f",
        mixer="mixer",
        feed_forward="mixer",
        before_mixer="norm",
        before_feed_forward="norm",
    )

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        kinds = _kinds(found, ("layers_block_type", "layer_types"), "hybrid_override_pattern")
        return found | {"layers_block_type": kinds, "num_hidden_layers": len(kinds)}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        kinds = config.hf["layers_block_type"]
        layers = tuple(index for index, kind in enumerate(kinds) if kind == LINEAR)
        heads = config.heads_of(0)
        size = config.intermediate_size
        return with_states(
            config,
            FIELDS.layout(config.hf),
            layers,
            heads_by_layer=tuple(heads if kind == FULL else None for kind in kinds),
            intermediate_sizes=tuple(size if kind == MLP else 0 for kind in kinds),
            experts=config.experts if MOE in kinds else None,
        )

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        hf = config.hf
        kinds = hf["layers_block_type"]
        if MOE not in kinds:  # see `read`
            return ExpertsConfig(num_experts=1, num_per_token=1, intermediate_size=1)
        return ExpertsConfig(
            num_experts=integer(hf, "n_routed_experts"),
            num_per_token=integer(hf, "num_experts_per_tok"),
            intermediate_size=integer(hf, "moe_intermediate_size"),
            shared_size=integer(hf, "moe_shared_expert_intermediate_size"),
            dense_layers=tuple(index for index, kind in enumerate(kinds) if kind != MOE),
        )

    @classmethod
    def with_predictor(cls, config: DecoderConfig) -> DecoderConfig | None:
        """A predictor is several layers; of several predictors the first one is used."""
        hf = config.hf
        if integer(hf, "num_nextn_predict_layers", default=0) < 1:
            return None
        kinds = [*hf["layers_block_type"], *_predictor_kinds(hf)]
        longer = cls.read({**hf, "layers_block_type": kinds})
        return replace(longer, context_length=config.context_length)

    def predictor(self) -> Combination:
        count, size = len(_predictor_kinds(self.config.hf)), self.config.hidden_size
        names = [f"mtp.layers.{at}" for at in range(count)]
        first = self.config.num_layers - count
        return Combination(
            projection=projection(self.build, f"{names[0]}.eh_proj", 2 * size, size, bias=False),
            embedding_norm=self.named_norm(f"{names[0]}.enorm"),
            state_norm=self.named_norm(f"{names[0]}.hnorm"),
            layers={name: self.layer(first + at) for at, name in enumerate(names)},
            norm=self.named_norm(f"{names[-1]}.final_layernorm"),
        )

    @classmethod
    def checkpoint_name(cls, name: str) -> str:
        """Published files call the model a backbone."""
        return f"model.{name.removeprefix('backbone.')}" if name.startswith("backbone.") else name

    def layer(self, index: int) -> Layer:
        if self.kind(index) in (LINEAR, FULL):
            return PartialLayer(mixer=self.mixer_sublayer(index))
        return PartialLayer(feed_forward=self.feed_forward_sublayer(index))

    def kind(self, index: int) -> str:
        return str(self.config.hf["layers_block_type"][index])

    def mixer(self, index: int) -> Mixer:
        hf, config = self.config.hf, self.config
        if self.kind(index) == FULL:
            bias = config.attention_bias
            return self.attention(index, qkv_bias=bias, o_bias=bias, cos_sin=self.unrotated())
        return Mamba2(
            self.build,
            index,
            config.hidden_size,
            FIELDS.layout(hf),
            bias=switch(hf, "use_bias"),
            conv_bias=switch(hf, "use_conv_bias"),
            norm_eps=config.norm_eps,
            dt_range=dt_range(hf),
        )

    def feed_forward(self, index: int) -> FeedForward:
        if self.kind(index) == MOE:
            assert self.config.experts is not None
            return self.mixture(self.config.experts)
        return self.plain_mlp("up_proj", "down_proj", bias=self.config.mlp_bias)

    def shared_expert(self, size: int) -> FeedForward:
        return self.plain_mlp(
            "up_proj",
            "down_proj",
            bias=self.config.mlp_bias,
            size=size,
            build=self.build.beside_experts,
        )

    def latent(self) -> Latent | None:
        size = self.config.hf.get("moe_latent_size")
        if size is None:
            return None
        if self.config.mlp_bias:
            raise ConfigError("config.json asks for mlp_bias and moe_latent_size, which is not "
                              "implemented")  # fmt: skip
        size = integer(self.config.hf, "moe_latent_size")
        return Latent(inward="fc1_latent_proj", outward="fc2_latent_proj", size=size)


def _predictor_kinds(hf: Mapping[str, Any]) -> list[str]:
    """The kind of each layer of the predictor."""
    usual = {"mtp_layers_block_type": [FULL, MOE]}
    said = hf if hf.get("mtp_hybrid_override_pattern") is not None else {**usual, **hf}
    return _kinds(said, ("mtp_layers_block_type",), "mtp_hybrid_override_pattern")


def _kinds(hf: Mapping[str, Any], names: tuple[str, ...], pattern_name: str) -> list[str]:
    """The kind of each layer, in a list or in a pattern of letters; ConfigError if config.json does
    not say it."""
    known = (LINEAR, FULL, MLP, MOE)
    said = next((hf[name] for name in names if hf.get(name) is not None), None)
    pattern = hf.get(pattern_name)
    if said is None and isinstance(pattern, str):
        said = [LETTERS.get(letter, letter) for letter in pattern]
    if not isinstance(said, list) or not said:
        raise ConfigError(
            f"config.json must say the kind of each layer in {names[0]!r} or in {pattern_name!r}, "
            f"got {said!r} and {pattern!r}"
        )
    kinds = kinds_of({names[0]: said}, known, names[0], num_layers=len(said))
    assert kinds is not None
    return kinds
