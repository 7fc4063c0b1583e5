"""The same words every time, for every kind of cache: token ids and their log probabilities are
equal, bit by bit, whatever is cached, who else is served, and how prompts are cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sapwood.app.building.resolving import Resolved, resolve_config
from sapwood.base.errors import ConfigError
from sapwood.kernels.cpu import CpuKernels
from sapwood.schema.config.engine import EngineConfig
from tests.adapters import OPTIONS as ADAPTERS
from tests.adapters import VOCABULARY, save_adapters
from tests.app.turned_engine import Answer, Question, TurnedEngine
from tests.models.lm.cases import CASES, peer_of
from tests.models.lm.peer import SIZES
from tests.tiers import examples
from tests.tiny import save_qwen3, write_llama, write_tokenizer

ISAS = CpuKernels.usable_isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="the native kernels are not built")

LARGE_LATENT = {"kv_lora_rank": 256, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32}
"""Of which prompts would cost less in the expanded form."""
MODELS: dict[str, dict[str, Any]] = {
    "gpt_oss": {},  # windows, sinks, experts
    "gemma3": {},
    "mixtral": {},
    "lfm2_moe": {},
    "mamba": {},
    "falcon_h1": {},  # attention and Mamba 2 in one layer
    "minimax": {},  # lightning attention
    "qwen3_next": {},  # gated delta rules
    "kimi_linear": {},
    "deepseek_v3": LARGE_LATENT,
    "deepseek_v32": {"index_topk": 40, **LARGE_LATENT},
}
"""Case of tests/models/lm/cases.py -> other fields than there: each kind of cache and of layer."""
NEVER_RETRACTED = ("mamba", "mamba2", "falcon_mamba", "lfm2, no attention")
"""Without keys and values there are no pages to run out of."""
STORAGE: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8 keys": {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
    "fp8 keys": {"dtype": "float32", "kv_cache_dtype": "fp8_e4m3"},
    "int8": {"dtype": "bfloat16", "quantization": "w8a8_int8"},
    "codes": {"dtype": "bfloat16", "quantization": "fp8"},
}
SMALL_POOL = {"max_total_tokens": 176, "schedule_conservativeness": 0.0}
"""So few pages that requests are retracted."""
GUESSING = {"speculative_algorithm": "NGRAM", "disable_speculative_adaptation": True}
STATES = {"mamba_track_interval": 4, "max_mamba_cache_size": 40}
FEW_STATES = {"mamba_track_interval": 8, "max_mamba_cache_size": 6}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 131, (length,), generator=generator).tolist()


STEM = text(70, seed=1)
QUESTIONS = [
    Question([*STEM, *text(9, seed=2)], 12),
    Question(text(3, seed=3), 20, temperature=1.0, seed=5),
    Question([*STEM, *text(33, seed=4)], 12),
    Question(text(150, seed=5), 12, temperature=0.7, seed=9),
    Question(text(40, seed=6), 16),
    Question([*STEM[:40], *text(20, seed=7)], 16, temperature=1.3, seed=2),
    Question(text(1, seed=8), 24),
    Question([3, 4, 5] * 20, 24),
]
CROWD = [Question(text(6 + 3 * index, seed=30 + index), 24) for index in range(8)]
"""Whose outputs are longer than their prompts, so that a pool of pages overflows late."""


@cache
def saved(case: str, directory: Path) -> Path:
    """A tiny model of transformers as a checkpoint, with a tokenizer."""
    directory.mkdir()
    peer = peer_of(case, **MODELS.get(case, {}))
    weights = {name: tensor.clone().contiguous() for name, tensor in peer.weights.items()}
    save_file(weights, directory / "model.safetensors")
    config = peer.hf_config | {"eos_token_id": SIZES["vocab_size"] - 1, "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config, default=str))
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")
    return lambda case: saved(case, folder / case.replace(" ", "_"))


def keeps_states(case: str) -> bool:
    config = str(peer_of(case, **MODELS.get(case, {})).hf_config)
    return any(name in config for name in ("mamba", "conv", "linear_attention", "lightning"))


def ways(has_states: bool) -> dict[str, dict[str, Any]]:
    states, few = (STATES, FEW_STATES) if has_states else ({}, {})
    return {
        "chunks of 7, two threads": {"chunked_prefill_size": 7, "num_threads": 2, **states},
        "chunks of 32, op by op": {"chunked_prefill_size": 32, "disable_graphs": True, **states},
        "retraction": {"overlap_depth": 1, "chunked_prefill_size": 33, **SMALL_POOL, **few},
        "retraction, overlap": {
            "overlap_depth": 2,
            "chunked_prefill_size": 16,
            **SMALL_POOL,
            **few,
        },
        "guesses": {**GUESSING, **states},
    }


def assert_same(found: Sequence[Answer], expected: Sequence[Answer], way: str) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == other, f"{way}: question {index}"


def check(path: Path, case: str, common: dict[str, Any]) -> None:
    common = {"page_size": 4, "max_total_tokens": 1600, "max_running_requests": 16, **common}
    with TurnedEngine(path, **common) as engine:
        expected = engine.alone(QUESTIONS)
        crowd = engine.alone(CROWD)
        assert_same(engine.alone(QUESTIONS), expected, "warm")
        engine.flush()
        assert_same(engine.answers(QUESTIONS * 2), expected * 2, "sixteen at once")
        assert_same(engine.answers(QUESTIONS), expected, "together and warm")
    assert len({tuple(tokens) for tokens, _ in expected}) == len(expected)
    for way, options in ways(keeps_states(case)).items():
        with TurnedEngine(path, **{**common, **options}) as engine:
            if "retraction" in way:
                assert_same(engine.answers(CROWD), crowd, way)
                assert case in NEVER_RETRACTED or engine.status().num_retractions > 0, way
            else:
                assert_same(engine.answers(QUESTIONS), expected, f"{way}, together")
                assert_same(engine.alone(QUESTIONS), expected, f"{way}, warm and alone")
            guesses = engine.status().speculated
        assert way != "guesses" or (guesses is not None and guesses.num_drafted > 0)


@pytest.mark.parametrize(
    ("case", "storage", "isa"),
    [
        (case, [*STORAGE][index % len(STORAGE)], ISAS[-1 - index % len(ISAS)])
        for index, case in enumerate(MODELS)
        if ISAS
    ],
)
def test_a_model_of_each_kind(
    saved_model: Callable[[str], Path], case: str, storage: str, isa: str
) -> None:
    check(saved_model(case), case, {"kernels": f"cpu:{isa}", **STORAGE[storage]})


@pytest.mark.long
@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8 keys"])
@pytest.mark.parametrize("case", CASES)
def test_every_architecture(saved_model: Callable[[str], Path], case: str, storage: str) -> None:
    check(saved_model(case), case, STORAGE[storage])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_in_a_mixed_batch(tmp_path: Path, dtype: str) -> None:
    """Beside requests of other adapters and of none; also those of the embedding and the output
    layer."""
    path = save_qwen3(tmp_path / "model")
    names = {"all": ADAPTERS["all"], **{name: VOCABULARY[name] for name in ("embedding", "output")}}
    folders, _ = save_adapters(path, tmp_path / "adapters", names)
    questions = [
        replace(question, adapter=adapter)
        for question in QUESTIONS[:6]
        for adapter in ("", *folders)
    ]
    common = {"page_size": 4, "max_total_tokens": 2400, "max_running_requests": 24, "dtype": dtype}
    common |= {"enable_lora": True, "max_lora_rank": 16}
    with TurnedEngine(path, **common) as engine:
        for name, folder in folders.items():
            engine.load(name, folder)
        expected = engine.alone(questions)
        assert len({tuple(tokens) for tokens, _ in expected}) > 20
        engine.flush()
        assert_same(engine.answers(questions), expected, "together")
        assert_same(engine.answers(questions), expected, "together and warm")
    for way in ({"chunked_prefill_size": 7, "num_threads": 2}, {"chunked_prefill_size": 50}):
        with TurnedEngine(path, **common, **way, **GUESSING) as engine:
            for name, folder in folders.items():
                engine.load(name, folder)
            assert_same(engine.answers(questions), expected, f"{way}")


@cache
def answers_alone(path: Path, dtype: str) -> list[Answer]:
    with TurnedEngine(path, dtype=dtype, page_size=4, max_total_tokens=1600) as engine:
        return engine.alone([*QUESTIONS, *CROWD])


@st.composite
def schedules(draw: st.DrawFn, has_states: bool) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """(which question, when it comes) of each request, and how the engine is started."""
    which = st.integers(0, len(QUESTIONS) + len(CROWD) - 1)
    asked = draw(st.lists(st.tuples(which, st.integers(0, 12)), min_size=1, max_size=10))
    page_size = draw(st.sampled_from([1, 4, 8, 16]))
    num_tokens = draw(st.integers(200, 600))
    options = {
        "page_size": page_size,
        "max_total_tokens": num_tokens - num_tokens % page_size,
        "chunked_prefill_size": draw(st.sampled_from([1, 3, 7, 32, -1])),
        "max_running_requests": draw(st.integers(1, 8)),
        "num_threads": draw(st.integers(1, 3)),
        "schedule_conservativeness": draw(st.sampled_from([0.0, 1.0])),
        "disable_radix_cache": draw(st.booleans()),
        "disable_graphs": draw(st.booleans()),
        "overlap_depth": draw(st.sampled_from([1, 2])),
        **draw(st.sampled_from([{}, GUESSING])),
    }
    if has_states:
        options["mamba_track_interval"] = page_size * draw(st.integers(1, 4))
        options["max_mamba_cache_size"] = draw(st.none() | st.integers(1, 8))
    return asked, options


@settings(
    max_examples=examples(500, 12), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_schedule(saved_model: Callable[[str], Path], data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(["mixtral", "gpt_oss", "qwen3_next", "deepseek_v32"]))
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]))
    path = saved_model(case)
    expected = answers_alone(path, dtype)
    asked, options = data.draw(schedules(keeps_states(case)))
    questions = [*QUESTIONS, *CROWD]
    with TurnedEngine(path, dtype=dtype, **options) as engine:
        for again in ("", ", asked again"):
            found = engine.answers(
                [replace(questions[which], arrives=arrives) for which, arrives in asked]
            )
            assert_same(found, [expected[which] for which, _ in asked], f"{options}{again}")


def test_products_of_other_kernels_are_not_called_exact(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model")

    def resolved(**options: Any) -> Resolved:
        values = {"model": str(path), "load_format": "dummy", "device": "cpu", **options}
        return resolve_config(EngineConfig.of(values), home=tmp_path)

    name = "--enable-deterministic-inference"
    for kernels in ("torch", "reference"):
        with pytest.raises(ConfigError, match=f"{name} holds for .* kernels {kernels} compute"):
            resolved(kernels=kernels, enable_deterministic_inference=True)
        with pytest.raises(ConfigError, match="--cpu-products exact holds for"):
            resolved(kernels=kernels, cpu_products="exact")
        assert resolved(kernels=kernels).config.execution.cpu_products == "fast"
    found = resolved()
    assert found.config.execution.cpu_products == "exact"
