"""Which options go together with which models, where no other test is about them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.execution import ExecutionConfig
from sapwood.schema.config.lora import LoraConfig
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.config.parallel import ParallelConfig
from sapwood.schema.config.resolve import resolve
from sapwood.schema.config.speculation import SpeculationConfig
from tests.schema.config.test_resolve import CPU, MODEL

JOINT = EngineConfig(parallel=ParallelConfig(tp_size=2, dp_size=2, enable_dp_attention=True))


@pytest.mark.parametrize(
    ("asked", "model", "said"),
    [
        (
            {"speculation": SpeculationConfig(speculative_algorithm="NGRAM")},
            {},
            "--speculative-algorithm",
        ),
        ({"lora": LoraConfig(lora_paths="a=b")}, {}, "LoRA adapters"),
        (
            {"execution": ExecutionConfig(enable_return_routed_experts=True)},
            {},
            "--enable-return-routed-experts",
        ),
        ({}, {"makes_numbers": True}, "makes embeddings or scores"),
        ({"model": ModelConfig(model_impl="transformers")}, {}, "transformers library"),
    ],
)
def test_what_shared_feed_forwards_do_not_go_with(
    asked: dict[str, Any], model: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"--enable-dp-attention.*{said}|{said}.*leave out"):
        resolve(replace(JOINT, **asked), CPU, replace(MODEL, **model))


def test_each_replica_has_the_cache_of_all_heads() -> None:
    config, _ = resolve(JOINT, CPU, MODEL)
    assert (config.parallel.num_ranks, config.parallel.attention_size) == (1, 1)
    assert EngineConfig(parallel=ParallelConfig(tp_size=2)).parallel.attention_size == 2
