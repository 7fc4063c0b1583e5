"""Engines that share feed-forwards, each with its own requests, answer as one engine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from sapwood import LLM
from sapwood.app.building.resolving import resolve_config
from sapwood.base.errors import ConfigError, EngineUnavailable
from sapwood.schema.config.engine import EngineConfig
from tests.app.test_logprobs import ask
from tests.tiny import save_lfm2, save_llama, save_qwen3_moe

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], list(range(40)), [3, 1]]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0, "max_new_tokens": 12},
    {"temperature": 1.0, "seed": 3, "max_new_tokens": 20, "repetition_penalty": 1.3},
    {"temperature": 0, "max_new_tokens": 4, "regex": "[a-c]{4}"},
    {"temperature": 0, "max_new_tokens": 1},
]
JOINT: dict[str, Any] = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}


def outputs(llm: LLM) -> list[tuple[int, ...]]:
    return [result.token_ids for result in llm.generate(PROMPTS, SAMPLING)]


def outputs_for_ever(llm: LLM) -> None:
    while True:
        outputs(llm)


def prompt_logprobs(llm: LLM) -> list[list[float]]:
    """Their logits are computed apart from those of the tokens that are sampled."""
    told = [result.prompt for result in ask(llm, PROMPTS[:3], 0)]
    return [
        np.frombuffer(one.logprobs.tokens, np.float32).tolist()
        for one in told
        if one is not None and one.logprobs is not None
    ]


def long(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("save", "options"),
    [
        long(save_qwen3_moe, {"ep_size": 2}),
        long(save_qwen3_moe, {"ep_size": 2, "moe_a2a_backend": "torch"}),
        long(save_llama, {"enable_dp_lm_head": True, "disable_overlap_schedule": True}),
        long(save_llama, {"tie_word_embeddings": True, "chunked_prefill_size": 16}),
        long(save_lfm2, {"disable_radix_cache": True}),
    ],
)
def test_joint_engines_answer_as_one_until_one_is_killed(
    make_llm: Callable[..., LLM],
    tmp_path: Path,
    save: Callable[..., Path],
    options: dict[str, Any],
) -> None:
    fields = {name: options[name] for name in ("tie_word_embeddings",) if name in options}
    options = {name: value for name, value in options.items() if name not in fields}
    usual = {"model": save(tmp_path / "model", **fields), "load_format": "auto"}
    alone = make_llm(**usual)
    expected, scored = outputs(alone), prompt_logprobs(alone)
    assert len(scored) == 3
    llm = make_llm(**usual, **JOINT, **options, load_balance_method="round_robin")
    assert outputs(llm) == expected
    one_sided = llm.generate(PROMPTS[:1], SAMPLING[:1])  # the other one has nothing to do
    assert one_sided[0].token_ids == expected[0]
    for found, wanted in zip(prompt_logprobs(llm), scored, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)
    each = [llm.run(engine.status()) for engine in llm.services.replicas]
    assert sum(status.num_finished for status in each) == 8
    assert all(status.num_finished >= 3 for status in each)
    engines = [
        child
        for child in psutil.Process().children()
        if "sapwood.app.building.engine_process" in child.cmdline()
    ]
    assert len(engines) == 2
    os.kill(engines[0].pid, signal.SIGKILL)
    with pytest.raises(EngineUnavailable, match="was ended by signal SIGKILL"):
        outputs_for_ever(llm)
    llm.close()
    assert not any(engine.is_running() for engine in engines)


def test_the_model_must_be_one_whose_layers_are_apart(make_llm: Callable[..., LLM]) -> None:
    with pytest.raises(ConfigError, match=r"makes embeddings.*leave out --enable-dp-attention"):
        make_llm(**JOINT, is_embedding=True)


def test_deepep_says_what_it_lacks_here(tmp_path: Path) -> None:
    options = {**JOINT, "ep_size": 2, "moe_a2a_backend": "deepep", "device": "cpu"}
    asked = EngineConfig.of({"model": str(save_qwen3_moe(tmp_path / "model")), **options})
    with pytest.raises(ConfigError, match=r"deepep cannot be used: it runs on cuda.*backend torch"):
        resolve_config(asked, home=tmp_path)
