"""MiMo-V2-Flash. Source: Xiaomi 2025, its technical report and model code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.layer import Mixer
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import (
    FULL,
    SLIDING,
    AttentionHeads,
    DecoderConfig,
    ExpertsConfig,
)
from sapwood.models.drafts.head import Combination, projection
from sapwood.models.hf_fields import integer, optional_number
from sapwood.models.lm.architecture import Architecture
from sapwood.models.lm.grouped_mixture import GroupedMixture

_SINKS = ".attention_sink_bias"
PREDICTORS = "model.mtp.layers."
NUM_PREDICTORS = 3
"""In published files, which do not say it."""


class MiMoV2FlashForCausalLM(GroupedMixture):
    """Layers with a window have sinks, and key and value heads of their own number; values are
    shorter than keys. The layers that predict further tokens, which are dense and have a window,
    are used for drafts alone."""

    absent: ClassVar = {
        **GroupedMixture.absent,
        "attention_value_scale": 0.707,
        "head_dim": 192,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "partial_rotary_factor": 0.334,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5_000_000.0,
        "sliding_window": 129,
        "swa_rope_theta": 10_000.0,
        "v_head_dim": 128,
    }
    spelled: ClassVar = {"rms_norm_eps": ("rms_norm_eps", "layernorm_epsilon")}
    ignorable = (*Architecture.ignorable, "model.mtp.*")

    @classmethod
    def checkpoint_name(cls, name: str) -> str:
        name = super().checkpoint_name(name)
        if name.startswith(PREDICTORS):
            name = name.replace(".pre_mlp_layernorm.", ".post_attention_layernorm.")
        return name.removesuffix(_SINKS) + ".sinks" if name.endswith(_SINKS) else name

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The first files have sliding_window_size, tokens that are seen besides the own one, and
        numbers in hybrid_layer_pattern and moe_layer_freq instead of names."""
        found = super().understood(hf)
        num_layers = integer(found, "num_hidden_layers")
        if "sliding_window_size" in found:
            found["sliding_window"] = integer(found, "sliding_window_size") + 1
        pattern = found.get("hybrid_layer_pattern") or [
            int(index > 0 and (index + 1) % 6 != 0) for index in range(num_layers)
        ]
        sparse = found.get("moe_layer_freq") or [int(index > 0) for index in range(num_layers)]
        found.setdefault("layer_types", [SLIDING if one else FULL for one in pattern])
        found.setdefault("mlp_layer_types", ["sparse" if one else "dense" for one in sparse])
        if len(found["mlp_layer_types"]) != num_layers:
            raise ConfigError(
                f"config.json must say of each of its {num_layers} layers whether it has experts, "
                f"got {found['mlp_layer_types']!r}"
            )
        if "attention_value_scale" in hf and hf["attention_value_scale"] is None:
            del found["attention_value_scale"]
        return found

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        said, own = config.hf, config.num_kv_heads
        in_windows = integer(said, "swa_num_key_value_heads", default=2 * own)
        for name, value in (
            ("add_full_attention_sink_bias", False),
            ("add_swa_attention_sink_bias", True),
            ("swa_head_dim", config.head_dim),
            ("swa_num_attention_heads", config.num_heads),
            ("swa_v_head_dim", said["v_head_dim"]),
        ):
            if said.get(name, value) != value:
                raise ConfigError(
                    f"the model's {name} is {said[name]!r}; only {value!r} is implemented"
                )
        value_dim = integer(said, "v_head_dim")
        if not 1 <= value_dim <= config.head_dim:
            raise ConfigError(
                f"the model has values of {value_dim} entries; from 1 to the {config.head_dim} of "
                "keys are implemented"
            )
        heads = tuple(
            AttentionHeads(
                num_heads=config.num_heads,
                num_kv_heads=in_windows if layer in config.windowed_layers else own,
                head_dim=config.head_dim,
            )
            for layer in range(config.num_layers)
        )
        return replace(config, heads_by_layer=heads, has_sinks=True)

    @classmethod
    def with_predictor(cls, config: DecoderConfig) -> DecoderConfig | None:
        return cls._longer(config, 1)

    @classmethod
    def with_predictors(cls, config: DecoderConfig) -> DecoderConfig | None:
        return cls._longer(config, NUM_PREDICTORS)

    @classmethod
    def _longer(cls, config: DecoderConfig, count: int) -> DecoderConfig | None:
        hf, num_layers = config.hf, config.num_layers
        if integer(hf, "num_nextn_predict_layers", default=NUM_PREDICTORS) < count:
            return None
        longer = cls.read(
            {
                **hf,
                "num_hidden_layers": num_layers + count,
                "layer_types": [*hf["layer_types"], *[SLIDING] * count],
                "mlp_layer_types": [*hf["mlp_layer_types"], *["dense"] * count],
            }
        )
        return replace(
            longer,
            context_length=config.context_length,
            hf={**longer.hf, "num_hidden_layers": num_layers},
        )

    def predictor(self) -> Combination:
        return self._predictor(0)

    def predictors(self) -> list[Combination]:
        count = self.config.num_layers - integer(self.config.hf, "num_hidden_layers")
        return [self._predictor(at) for at in range(count)]

    def _predictor(self, at: int) -> Combination:
        size, name = self.config.hidden_size, f"{PREDICTORS}{at}"
        first = integer(self.config.hf, "num_hidden_layers")
        return Combination(
            projection=projection(self.build, f"{name}.eh_proj", 2 * size, size, bias=False),
            embedding_norm=self.named_norm(f"{name}.enorm"),
            state_norm=self.named_norm(f"{name}.hnorm"),
            layers={name: self.layer(first + at)},
            norm=self.named_norm(f"{name}.final_layernorm"),
        )

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        kinds = config.hf["mlp_layer_types"]
        dense = tuple(index for index, kind in enumerate(kinds) if kind == "dense")
        return replace(super().experts_in(config), dense_layers=dense)

    def rope_of(self, index: int) -> RopeConfig | None:
        hf = self.config.hf
        if hf["layer_types"][index] == FULL:
            return self.config.rope
        return self.rope_of_windows({"rope_theta": hf["swa_rope_theta"]})

    def mixer(self, index: int) -> Mixer:
        hf = self.config.hf
        return self.attention(
            index,
            qkv_bias=self.config.attention_bias,
            sinks=index in self.config.windowed_layers,
            value_dim=integer(hf, "v_head_dim"),
            value_scale=optional_number(hf, "attention_value_scale"),
        )
