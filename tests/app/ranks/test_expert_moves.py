"""Engines whose ranks have different experts, and move them while they serve."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sapwood import LLM
from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.output import CallDone
from sapwood.schema.request import RecordExperts
from tests.app.llms import llms_of
from tests.models.lm.peer import make_peer
from tests.tiny import VOCAB, write_tokenizer

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], list(range(40))]
GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peer = make_peer(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        vocab_size=VOCAB,
        num_hidden_layers=2,
        head_dim=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        eos_token_id=257,
        bos_token_id=None,
    )
    directory = tmp_path_factory.mktemp("mixture")
    peer.model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture
def make_llm(mixture: Path) -> Iterator[Callable[..., LLM]]:
    with llms_of(mixture) as make:
        yield make


def outputs(llm: LLM) -> list[tuple[int, ...]]:
    return [result.token_ids for result in llm.generate(PROMPTS, [GREEDY] * len(PROMPTS))]


def test_answers_stay_the_same_while_experts_move(
    make_llm: Callable[..., LLM], caplog: pytest.LogCaptureFixture
) -> None:
    expected = outputs(make_llm())
    with caplog.at_level(logging.INFO, logger="sapwood.app.ranks.expert_moves"):
        llm = make_llm(
            tp_size=2,
            ep_size=2,
            ep_num_redundant_experts=2,
            enable_eplb=True,
            eplb_rebalance_num_iterations=4,
            eplb_rebalance_layers_per_chunk=1,
        )
        assert outputs(llm) == expected
        assert outputs(llm) == expected
    told = [record.getMessage() for record in caplog.records]
    assert len(told) >= 4
    assert any("moved the experts of 1 layers" in one for one in told)
    assert not any("stay where they are" in one for one in told)


def test_experts_start_where_a_record_places_them(
    make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    """Recorded on one rank; with it placed on the ranks of two stages, where they move again."""
    alone = make_llm(
        expert_distribution_recorder_mode="stat", expert_distribution_recorder_dir=str(tmp_path)
    )
    expected, engine = outputs(alone), alone.services.engine

    def ask(action: Any) -> CallDone:
        return alone.run(engine.record_experts(RecordExperts(call_id="", action=action)))

    assert "no step" in ask("dump").message
    assert alone.run(engine.flush_cache()).done
    assert ask("start").done
    assert outputs(alone) == expected
    assert ask("stop").done
    assert ask("dump").done
    (path,) = tmp_path.glob("*.pt")
    counts = torch.load(path, weights_only=True)["logical_count"]
    num_tokens = sum(map(len, PROMPTS)) + (24 - 1) * len(PROMPTS)
    assert counts.sum(dim=(0, 2)).tolist() == [2 * num_tokens] * 2
    placed = make_llm(
        tp_size=2,
        pp_size=2,
        ep_size=2,
        ep_num_redundant_experts=2,
        init_expert_location=str(path),
        enable_eplb=True,
        eplb_rebalance_num_iterations=20,
    )
    assert outputs(placed) == expected


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ep_size": 2}, "must divide --tp-size"),
        ({"tp_size": 4, "ep_size": 3}, "must divide --tp-size"),
        ({"enable_eplb": True}, "spread over ranks"),
        ({"init_expert_location": "{}"}, "spread over ranks"),
        ({"expert_distribution_recorder_buffer_size": 0}, "or -1 for all"),
        ({"moe_a2a_backend": "mooncake"}, "no library that sapwood calls"),
        ({"moe_a2a_backend": "deepep", "tp_size": 2, "ep_size": 2}, "--enable-dp-attention"),
        ({"deepep_mode": "low_latency"}, "low_latency is not implemented"),
        ({"deepep_mode": "normal"}, "does nothing without --moe-a2a-backend deepep"),
        ({"moe_a2a_backend": "torch", "tp_size": 2, "ep_size": 2}, "--enable-dp-attention"),
        ({"ep_num_redundant_experts": 2}, "spread over ranks"),
        ({"tp_size": 2, "ep_size": 2, "ep_num_redundant_experts": -1}, ">= 0"),
        ({"eplb_rebalance_num_iterations": 0}, ">= 1"),
        ({"eplb_rebalance_layers_per_chunk": 0}, ">= 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        EngineConfig.of({"model": "none", **options})


def test_a_model_without_experts_is_refused(make_llm: Callable[..., LLM], tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="no experts to spread"):
        make_llm(tiny_llama, load_format="dummy", tp_size=2, ep_size=2)
