"""Every way to guess, with every feature, in every mode: nothing is refused, and no output differs.

Each case opens an LLM that guesses and asks for all features one after the other, so later ones
find their prompts in the prefix cache.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sapwood import LLM
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.text.generation import TextRequest
from tests.adapters import write_adapter
from tests.app.building.test_adapters import ask as ask_adapters
from tests.app.building.test_speculation import NGRAM, PROMPTS, SAME, Sample, ask, check_figures
from tests.app.llms import Make, llms_of
from tests.app.test_draft_heads import options_of, write_models
from tests.tiers import sweep

ALGORITHMS = (
    "ngram",
    "standalone",
    "eagle",
    "eagle3",
    "mimo",
    "ngram trees",
    "standalone trees",
    "eagle trees",
    "eagle3 trees",
)
MODES: dict[str, dict[str, Any]] = {
    "one step at a time": {"overlap_depth": 1},
    "overlap": {"overlap_depth": 2},
    "llguidance": {"grammar_backend": "llguidance"},
    "retractions": {"max_total_tokens": 96, "schedule_conservativeness": 0.0},
    "8-bit cache": {"kv_cache_dtype": "int8"},
    "chunks": {"chunked_prefill_size": 12},
    "op by op": {"disable_graphs": True},
    "adaptive": {"disable_speculative_adaptation": False, "skip_server_warmup": False},
    "adapters": {"enable_lora": True, "max_lora_rank": 4},
}


class Opened:
    """LLMs by model and options, and what they put out without guesses."""

    def __init__(self, models: Path, stack: ExitStack) -> None:
        self.models = models
        self._stack = stack
        self._makes: dict[Path, Make] = {}
        self._expected: dict[tuple[Path, str], dict[str, list[Sample]]] = {}

    def make(self, path: Path, options: dict[str, Any]) -> LLM:
        if path not in self._makes:
            context = llms_of(path, page_size=4, enable_return_hidden_states=True)
            self._makes[path] = self._stack.enter_context(context)
        if "enable_lora" in options:
            options = {**options, "lora_paths": f"other={self.models / 'adapter'}"}
        return self._makes[path](**options)

    def expected(self, path: Path, mode: str) -> dict[str, list[Sample]]:
        """By feature."""
        if (path, mode) not in self._expected:
            options = MODES[mode]
            common = {name: one for name, one in options.items() if "speculative" not in name}
            llm = self.make(path, common)
            self._expected[path, mode] = {name: asked(llm, name) for name in SAME}
            assert llm.stats().num_cached_tokens > 50
            llm.close()
        return self._expected[path, mode]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    models = write_models(tmp_path_factory.mktemp("heads"))
    write_adapter(models / "adapter", rank=4)
    write_adapter(models / "wide adapter", rank=24)
    with ExitStack() as stack:
        yield Opened(models, stack)


def guessing_options(models: Path, algorithm: str) -> tuple[Path, dict[str, Any]]:
    """(the model, options that let it have such guesses)"""
    algorithm, _, trees = algorithm.partition(" ")
    if trees and algorithm == "ngram":
        return models / "model", {**NGRAM, "speculative_ngram_min_bfs_breadth": 3}
    if trees:
        path, options = guessing_options(models, algorithm)
        return path, {
            **options,
            "speculative_num_steps": 4,
            "speculative_eagle_topk": 3,
            "speculative_num_draft_tokens": 8,
        }
    if algorithm == "ngram":
        return models / "model", NGRAM
    if algorithm == "standalone":
        return models / "model", {
            "speculative_algorithm": "STANDALONE",
            "speculative_draft_model_path": str(models / "model"),
            "speculative_draft_model_quantization": "w4a8",
            "disable_speculative_adaptation": True,
        }
    return options_of(models, algorithm)


def asked(llm: LLM, name: str) -> list[Sample]:
    wanted = SAME[name]
    options = dict(wanted.get("options", {}))
    if llm.services.adapters is not None and llm.services.adapters.is_on:
        options["adapter"] = llm.services.adapter_of("", "other")
    return ask(llm, **{**wanted, "options": options})


async def leave_early(llm: LLM) -> None:
    """Requests whose clients leave after the first few tokens."""

    async def one(index: int, prompt: list[int]) -> None:
        sampling = SamplingParams(temperature=0.0, max_new_tokens=200, ignore_eos=True)
        request = TextRequest(
            request_id=f"left{index}", prompt=prompt, options=RequestOptions(sampling=sampling)
        )
        stream = llm.services.generator.generate(request)
        num_tokens = 0
        async for chunk in stream:
            num_tokens += len(chunk.token_ids)
            if num_tokens > 3 * index:
                break
        await stream.aclose()

    await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(PROMPTS)))


@sweep(strength=1, algorithm=ALGORITHMS, mode=tuple(MODES))
def test_nothing_differs(opened: Opened, algorithm: str, mode: str) -> None:
    path, guessing = guessing_options(opened.models, algorithm)
    expected = opened.expected(path, mode)
    llm = opened.make(path, {**guessing, **MODES[mode]})
    llm.run(leave_early(llm))
    for name, samples in expected.items():
        for got, wanted in zip(asked(llm, name), samples, strict=True):
            assert got.token_ids == wanted.token_ids, name
            assert got.text == wanted.text, name
            assert got.finish == wanted.finish, name
            check_figures(got, wanted, atol=5e-2 if mode == "8-bit cache" else 1e-4)
            assert got.speculated is not None
            if got.finish.matched is None and not SAME[name].keys() & {"grammar", "stop"}:
                num_tokens = got.speculated.num_steps + got.speculated.num_accepted
                assert num_tokens == len(got.token_ids), name
    stats = llm.stats()
    assert stats.num_leased_pages == stats.num_running == stats.num_waiting == 0
    assert stats.num_cached_tokens > 50
    assert stats.speculated is not None
    if mode != "adaptive":
        assert 50 < stats.speculated.num_accepted < stats.speculated.num_drafted - 50
    llm.close()


@pytest.mark.parametrize("algorithm", ["ngram", "eagle3 trees"])
def test_adapters_of_different_ranks_and_the_base_in_one_batch(
    opened: Opened, algorithm: str
) -> None:
    """SGLang's scenario of test_lora_spec_decoding. Drafts are the base's."""
    path, guessing = guessing_options(opened.models, algorithm)
    paths = {"narrow": opened.models / "adapter", "wide": opened.models / "wide adapter"}
    options = {
        "lora_paths": json.dumps(
            [{"lora_name": name, "lora_path": str(one)} for name, one in paths.items()]
        ),
        "overlap_depth": 2,
    }
    wanted = [(name, prompt) for prompt in PROMPTS for name in ("", *paths)]
    llms = opened.make(path, options), opened.make(path, {**guessing, **options})
    expected, found = (ask_adapters(llm, wanted, max_new_tokens=24) for llm in llms)
    outputs = [tuple(result.token_ids) for result in expected]
    assert [tuple(result.token_ids) for result in found] == outputs
    for first in range(0, len(outputs), 3):
        assert len(set(outputs[first : first + 3])) == 3, "the adapters change the output"
    stats = llms[1].stats()
    assert stats.speculated is not None
    assert stats.speculated.num_accepted > 0


@pytest.mark.parametrize("algorithm", ["ngram trees", "standalone trees", "eagle trees"])
def test_trees_end_where_the_context_does(opened: Opened, algorithm: str) -> None:
    """A tree has more places than positions, for which there are no pages at the end."""
    path, guessing = guessing_options(opened.models, algorithm)
    limits = {"context_length": 64, "max_total_tokens": 512}
    asked_for = {"ignore_eos": True, "max_new_tokens": 48, "allowed_token_ids": (7, 8, 9)}
    asked_for |= {"temperature": 20.0, "seed": 1}
    expected = ask(opened.make(path, limits), **asked_for)
    found = ask(opened.make(path, {**guessing, **limits}), **asked_for)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [len(one.token_ids) for one in found] == [48] * len(PROMPTS)
