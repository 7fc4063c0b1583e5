"""What models with latent attention have in common (layers/latent_attention.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.kernels.latent import LatentSizes
from sapwood.layers.latent_attention import LatentAttention
from sapwood.layers.layer import Mixer
from sapwood.layers.rope_config import YarnScaling
from sapwood.layers.rotary import yarn_magnitude
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.architecture import Architecture


class LatentArchitecture(Architecture):
    """A decoder whose attention keeps latent rows, in DeepSeek's spelling."""

    rotates_pairs: ClassVar[bool] = True
    """Whether neighbouring entries rotate together; else halves."""
    has_windows = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """A head has the size of a query, whatever the file calls head_dim."""
        found = super().understood(hf)
        key_dim = integer(found, "qk_nope_head_dim") + integer(found, "qk_rope_head_dim")
        heads = integer(found, "num_attention_heads")
        return {**found, "head_dim": key_dim, "num_key_value_heads": heads}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        return replace(config, latent=latent_sizes(config))

    def mixer(self, index: int) -> Mixer:
        return self.latent_attention(index)

    def latent_attention(self, index: int, **details: Any) -> LatentAttention:
        """The layer's attention; details: other parameters of LatentAttention."""
        config, sizes = self.config, self.latent_sizes
        usual: dict[str, Any] = {
            "cos_sin": self.rotation_of(index),
            "eps": config.norm_eps,
            "scale": sizes.key_dim**-0.5 * self.sharpness,
            "pairs": self.rotates_pairs,
            "bias": config.attention_bias,
        }
        details = {**usual, **details}
        return LatentAttention(self.build, index, config.hidden_size, sizes, **details)

    @property
    def latent_sizes(self) -> LatentSizes:
        sizes = self.config.latent
        assert sizes is not None, "read() says them"
        return sizes

    @property
    def sharpness(self) -> float:
        """Factor of scores in texts that are longer than those of the training (yarn)."""
        scaling = self.config.rope.scaling
        if not isinstance(scaling, YarnScaling) or not scaling.mscale_all_dim:
            return 1.0
        return yarn_magnitude(scaling.factor, scaling.mscale_all_dim) ** 2

    def rotation_of(self, index: int) -> Any:
        """The table of cosines and sines of the entries that rotate."""
        rope = self.rope_of(index)
        if rope is None:
            return self.unrotated()
        return self.cos_sin(rope, self.latent_sizes.rope_dim)


class InterleavedByField(LatentArchitecture):
    """The files say whether neighbouring entries rotate together, which is usual."""

    def latent_attention(self, index: int, **details: Any) -> LatentAttention:
        hf = self.config.hf
        pairs = switch(hf, "rope_interleave") if "rope_interleave" in hf else self.rotates_pairs
        return super().latent_attention(index, **{"pairs": pairs, **details})


def latent_sizes(config: DecoderConfig) -> LatentSizes:
    """The sizes in config.json; ConfigError for what is missing or impossible."""
    hf = config.hf
    try:
        return LatentSizes(
            num_heads=config.num_heads,
            rank=integer(hf, "kv_lora_rank"),
            rope_dim=integer(hf, "qk_rope_head_dim"),
            nope_dim=integer(hf, "qk_nope_head_dim"),
            value_dim=integer(hf, "v_head_dim"),
            query_rank=integer(hf, "q_lora_rank") if hf.get("q_lora_rank") is not None else None,
        )
    except ValueError as error:
        raise ConfigError(f"config.json: {error}") from error


def dense_layers_of(config: DecoderConfig, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    """The layers without experts, as mlp_layer_types says; `otherwise` if it is absent."""
    kinds = config.hf.get("mlp_layer_types")
    if kinds is None:
        return otherwise
    known = {"dense", "sparse"}
    if (
        not isinstance(kinds, list)
        or len(kinds) != config.num_layers
        or not known.issuperset(map(str, kinds))
    ):
        raise ConfigError(
            f"config.json must have dense or sparse for each of its {config.num_layers} layers in "
            f"'mlp_layer_types', got {kinds!r}"
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "dense")
