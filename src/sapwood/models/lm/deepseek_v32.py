"""DeepSeek V3.2 and GLM-5, whose tokens attend to some keys only.

Sources: DeepSeek-AI 2025, DeepSeek-V3.2-Exp; Z.ai 2026, its model code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.indexer import Chooser, Indexer, IndexSizes
from sapwood.layers.latent_attention import LatentAttention
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.deepseek_v2 import DeepseekV3ForCausalLM
from sapwood.models.lm.latent import dense_layers_of


class DeepseekV32ForCausalLM(DeepseekV3ForCausalLM):
    """DeepSeek V3 with an indexer in every layer."""

    absent: ClassVar = {
        **DeepseekV3ForCausalLM.absent,
        "index_topk": 2048,
        "index_head_dim": 128,
        "index_n_heads": 64,
    }
    indexer_pairs: ClassVar[bool] = False
    """Whether neighbouring entries of an indexer's heads rotate together; else halves."""

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        if config.latent is None or config.latent.query_rank is None:
            raise ConfigError("config.json must have an integer 'q_lora_rank' for its indexers")
        layers = cls.index_layers(config)
        return replace(
            config,
            index_layers=layers,
            index_width=_index_sizes(config).head_dim,
            other_parameters=len(layers) * _index_parameters(config),
        )

    @classmethod
    def with_predictor(cls, config: DecoderConfig) -> DecoderConfig | None:
        """The predictor has an indexer, whatever the layers before it have."""
        longer = super().with_predictor(config)
        if longer is None:
            return None
        return replace(
            longer,
            index_layers=(*config.index_layers, config.num_layers),
            other_parameters=config.other_parameters + _index_parameters(config),
        )

    @classmethod
    def index_layers(cls, config: DecoderConfig) -> tuple[int, ...]:
        """The layers that choose keys; the others take those of the layer before."""
        return tuple(range(config.num_layers))

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        experts = super().experts_in(config)
        return replace(experts, dense_layers=dense_layers_of(config, experts.dense_layers))

    def latent_attention(self, index: int, **details: Any) -> LatentAttention:
        return super().latent_attention(index, **{"chooser": self.chooser(index), **details})

    def chooser(self, index: int) -> Chooser:
        config, sizes = self.config, _index_sizes(self.config)
        if index not in config.index_layers:
            return Chooser(sizes.num_chosen)
        query_rank = self.latent_sizes.query_rank
        assert query_rank is not None, "read() says it"
        return Indexer(
            self.build,
            index,
            config.hidden_size,
            query_rank,
            sizes,
            cos_sin=self.rotation_of(index),
            pairs=self.indexer_pairs,
        )


class GlmMoeDsaForCausalLM(DeepseekV32ForCausalLM):
    """Some layers take the keys that an earlier one has chosen."""

    absent: ClassVar = {
        **DeepseekV32ForCausalLM.absent,
        "n_group": 1,
        "topk_group": 1,
        "index_n_heads": 32,
    }
    indexer_pairs = True

    @classmethod
    def index_layers(cls, config: DecoderConfig) -> tuple[int, ...]:
        hf, number = config.hf, config.num_layers
        kinds = hf.get("indexer_types")
        if kinds is None and hf.get("index_topk_pattern") is not None:
            letters = {"F": "full", "S": "shared"}
            kinds = [letters.get(one, one) for one in hf["index_topk_pattern"]]
        if kinds is None:
            every = max(1, integer(hf, "index_topk_freq", default=1))
            offset = integer(hf, "index_skip_topk_offset", default=2)
            return tuple(at for at in range(number) if max(at - offset + 1, 0) % every == 0)
        known = {"full", "shared"}
        is_list = isinstance(kinds, list) and len(kinds) == number
        if not is_list or not known.issuperset(map(str, kinds)) or kinds[0] != "full":
            raise ConfigError(
                f"config.json must have full or shared for each of its {number} layers, the first "
                f"of them full, in 'indexer_types', got {kinds!r}"
            )
        return tuple(at for at, kind in enumerate(kinds) if kind == "full")


def _index_parameters(config: DecoderConfig) -> int:
    """Weights of one indexer."""
    sizes, latent = _index_sizes(config), config.latent
    assert latent is not None, "read() says it"
    assert latent.query_rank is not None, "read() says it"
    found = sizes.head_dim * (latent.query_rank * sizes.num_heads + config.hidden_size)
    return found + config.hidden_size * sizes.num_heads


def _index_sizes(config: DecoderConfig) -> IndexSizes:
    hf = config.hf
    try:
        sizes = IndexSizes(
            num_heads=integer(hf, "index_n_heads"),
            head_dim=integer(hf, "index_head_dim"),
            num_chosen=integer(hf, "index_topk"),
        )
    except ValueError as error:
        raise ConfigError(f"config.json: {error}") from error
    rotated = integer(hf, "qk_rope_head_dim")
    if sizes.head_dim < rotated:
        raise ConfigError(
            f"config.json's index_head_dim is {sizes.head_dim}, but {rotated} entries are rotated"
        )
    return sizes
