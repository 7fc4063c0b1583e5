"""Guessed tokens change how many steps an output takes, and nothing else, whatever is asked for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from sapwood import LLM
from sapwood.frontends.server import create_app
from sapwood.schema import grammar as grammars
from sapwood.schema.draft_tree import ROOT
from sapwood.schema.logprobs import LogprobOptions, TokenLogprobs
from sapwood.schema.output import Finish, Speculated
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.thinking import ThinkingBudget
from sapwood.speculative.interface import Guesses
from sapwood.text.generation import TextChunk, TextRequest
from tests.app.llms import llms_of
from tests.tiny import save_lfm2, save_qwen3

PROMPTS = [[5, 6, 7, 8] * 4, [9, 9, 9], [40], [11, 12, 13, 5, 6, 7, 8, 5, 6]]
JSON = {"type": "object", "properties": {"kind": {"enum": ["one", "two"]}}, "required": ["kind"]}
NGRAM = {"speculative_algorithm": "NGRAM", "disable_speculative_adaptation": True}
Make = Callable[..., LLM]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture(scope="module")
def hybrid_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lfm2(tmp_path_factory.mktemp("models") / "tiny-lfm2")


@pytest.fixture
def make_llm(model_path: Path) -> Iterator[Make]:
    with llms_of(model_path, page_size=4, enable_return_hidden_states=True) as make:
        yield make


@dataclass
class Sample:
    chunks: list[TextChunk]

    @property
    def token_ids(self) -> list[int]:
        return [token_id for chunk in self.chunks for token_id in chunk.token_ids]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def logprobs(self) -> TokenLogprobs:
        return TokenLogprobs.joined([chunk.logprobs for chunk in self.chunks if chunk.logprobs])

    @property
    def hidden_states(self) -> np.ndarray:
        pieces = [piece for chunk in self.chunks for piece in chunk.hidden_states]
        return np.array([np.frombuffer(piece, dtype="<f4") for piece in pieces])

    @property
    def finish(self) -> Finish:
        finish = self.chunks[-1].finish
        assert finish is not None
        return finish

    @property
    def speculated(self) -> Speculated | None:
        return self.chunks[-1].speculated


def ask(llm: LLM, *, n: int = 1, options: Mapping[str, Any] = {}, **sampling: Any) -> list[Sample]:
    """All prompts at once; each of the n samples of a prompt is one of the results."""
    params = SamplingParams(**{"temperature": 0.0, "max_new_tokens": 24, **sampling})

    async def one(index: int, prompt: list[int]) -> list[Sample]:
        request = TextRequest(
            request_id=f"r{index}",
            prompt=prompt,
            options=RequestOptions(sampling=params, **options),
            n=n,
        )
        samples = [Sample([]) for _ in range(n)]
        async for chunk in llm.services.generator.generate(request):
            samples[chunk.index].chunks.append(chunk)
        return samples

    async def every() -> list[Sample]:
        each = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(PROMPTS)))
        return [sample for samples in each for sample in samples]

    return llm.run(every())


class Oracle:
    """Guesses what some earlier run put out, with a mistake in every fifth place."""

    def __init__(self, samples: Sequence[Sample], n: int) -> None:
        self._outputs = {
            tuple(prompt): samples[index * n].token_ids for index, prompt in enumerate(PROMPTS)
        }

    def begin(self, namespace: str, prompt_ids: Sequence[int]) -> OracleDraft:
        return OracleDraft(self._outputs[tuple(prompt_ids)])


@dataclass
class OracleDraft:
    outputs: list[int]
    num_told: int = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        self.num_told += len(token_ids)

    def propose(self, most: int) -> Guesses:
        following = list(enumerate(self.outputs))[self.num_told :][:most]
        token_ids = [token if at % 5 < 4 else (token + 1) % 256 for at, token in following]
        return Guesses(token_ids=token_ids, kinds=[0] * len(token_ids))

    def close(self) -> None:
        pass


@dataclass
class TreeOracleDraft(OracleDraft):
    """The right tokens are one way through a tree, mostly not the first one."""

    def propose(self, most: int) -> Guesses:
        token_ids, parents, at = list[int](), list[int](), ROOT
        for place, token in list(enumerate(self.outputs))[self.num_told :]:
            for wrong in range(1, 1 + place % 3):
                # A wrong token, and one that would follow it.
                parents += [at, len(token_ids)]
                token_ids += [(token + wrong) % 256, token]
            if place % 7 == 6:
                break
            parents.append(at)
            token_ids.append(token)
            at = len(token_ids) - 1
        tree = Guesses(token_ids=token_ids, kinds=[0] * len(token_ids), parents=parents)
        return tree.only(range(min(most, len(token_ids))))


class TreeOracle(Oracle):
    def begin(self, namespace: str, prompt_ids: Sequence[int]) -> TreeOracleDraft:
        return TreeOracleDraft(self._outputs[tuple(prompt_ids)])


def consult(llm: LLM, oracle: Oracle) -> None:
    engine = llm._engine._engine
    assert engine is not None
    speculation = engine.scheduler._speculation
    assert speculation is not None
    speculation._drafter = oracle


SAME = {
    "greedy": {},
    "to the end": {"ignore_eos": True, "max_new_tokens": 40},
    "one token": {"max_new_tokens": 1},
    "seeds": {"temperature": 1.0, "seed": 7, "top_p": 0.9},
    "penalties": {"frequency_penalty": 0.8, "repetition_penalty": 1.3},
    "last tokens' penalties": {"presence_penalty": 0.8, "penalty_window": 5},
    "bias": {"logit_bias": {66: 4.0, 70: 5.0}},
    "allowed tokens": {"allowed_token_ids": (65, 66, 67)},
    "grammar": {"grammar": grammars.json_schema(JSON), "max_new_tokens": 60},
    "endless grammar": {"grammar": grammars.regex("(ab|ba)+"), "temperature": 1.0, "seed": 3},
    "least tokens": {"min_new_tokens": 12},
    "thinking budget": {
        "thinking_budget": ThinkingBudget(
            begin=(1,), end=(2,), forced=(3, 2), max_tokens=4, is_open=True
        )
    },
    "stop token": {"stop_token_ids": tuple(range(0, 256, 9))},
    "stop string": {"stop": ("a", "e", "T", "0")},
    "logprobs": {"options": {"logprobs": LogprobOptions(prompt_start=0, num_top=3)}},
    "hidden states": {"options": {"return_hidden_states": True}},
    "both, and a stop token": {
        "options": {"logprobs": LogprobOptions(num_top=2), "return_hidden_states": True},
        "stop_token_ids": tuple(range(0, 256, 7)),
    },
    "n samples": {"n": 3, "temperature": 1.0, "seed": 1},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "one step at a time": {},
    "overlap": {"overlap_depth": 2},
    "llguidance": {"grammar_backend": "llguidance"},
    "retractions": {"max_total_tokens": 96, "schedule_conservativeness": 0.0},
    "8-bit cache": {"kv_cache_dtype": "int8"},
    "chunks": {"chunked_prefill_size": 3},
    "short drafts": {"speculative_num_draft_tokens": 2},
    "adaptive": {"disable_speculative_adaptation": False, "skip_server_warmup": False},
}
TREES = {
    f"trees, {name}": VARIANTS[name]
    for name in ("overlap", "retractions", "8-bit cache", "chunks", "adaptive")
} | {"trees, op by op": {"disable_graphs": True}, "trees, torch": {"kernels": "torch"}}


@pytest.mark.parametrize("variant", VARIANTS | TREES)
def test_the_output_is_the_same(make_llm: Make, variant: str) -> None:
    options = (VARIANTS | TREES)[variant]
    oracle = TreeOracle if variant in TREES else Oracle
    common = {name: value for name, value in options.items() if "speculative" not in name}
    plain = make_llm(**common)
    guessing = make_llm(**NGRAM | options)
    num_accepted = 0
    for name, asked in SAME.items():
        expected = ask(plain, **asked)
        consult(guessing, oracle(expected, asked.get("n", 1)))
        for got, wanted in zip(ask(guessing, **asked), expected, strict=True):
            assert got.token_ids == wanted.token_ids, name
            assert got.text == wanted.text, name
            assert got.finish == wanted.finish, name
            check_figures(got, wanted, atol=5e-2 if "kv_cache_dtype" in options else 1e-4)
            assert got.speculated is not None
            assert wanted.speculated is None
            num_accepted += got.speculated.num_accepted
            has_grammar = "grammar" in asked
            if got.finish.matched is None and not has_grammar and not asked.get("stop"):
                steps = got.speculated.num_steps
                assert steps + got.speculated.num_accepted == len(got.token_ids), name
    few = 100 if variant in TREES else 200
    assert num_accepted > (0 if variant.endswith("adaptive") else few)
    for llm in (plain, guessing):
        stats = llm.stats()
        assert stats.num_leased_pages == stats.num_running == stats.num_waiting == 0


@pytest.mark.parametrize(
    "options",
    [{"overlap_depth": 2, "mamba_track_interval": 8}, {"max_mamba_cache_size": 5}],
    ids=["states to keep", "few slots"],
)
def test_states_go_back(make_llm: Make, hybrid_path: Path, options: dict[str, Any]) -> None:
    plain = make_llm(model=hybrid_path, **options)
    guessing = make_llm(model=hybrid_path, **NGRAM, **options)
    drafted = accepted = 0
    for name in ("to the end", "seeds", "grammar", "stop token", "n samples"):
        expected = ask(plain, **SAME[name])
        consult(guessing, Oracle(expected, SAME[name].get("n", 1)))
        for got, wanted in zip(ask(guessing, **SAME[name]), expected, strict=True):
            assert got.token_ids == wanted.token_ids, name
            assert got.speculated is not None
            drafted += got.speculated.num_drafted
            accepted += got.speculated.num_accepted
    assert drafted > accepted + 50, "some guesses were wrong"
    assert accepted > 100
    assert guessing.stats().num_leased_pages == 0


def test_thresholds_take_guesses_that_would_not_be_sampled(make_llm: Make) -> None:
    """Lossy for requests that sample, and for these alone; what a request forbids stays so."""
    plain = make_llm()
    at_one = make_llm(
        **NGRAM, speculative_accept_threshold_single=1.0, speculative_accept_threshold_acc=1.0
    )
    lossy = make_llm(
        **NGRAM, speculative_accept_threshold_single=0.3, speculative_accept_threshold_acc=0.1
    )
    differing = 0
    for name, asked in SAME.items():
        expected = ask(plain, **asked)
        for llm in (at_one, lossy):
            consult(llm, TreeOracle(expected, asked.get("n", 1)))
        is_exact = asked.get("temperature", 0.0) == 0.0
        results = zip(ask(at_one, **asked), ask(lossy, **asked), expected, strict=True)
        for exact, loose, wanted in results:
            assert exact.token_ids == wanted.token_ids, name
            if is_exact:
                assert loose.token_ids == wanted.token_ids, name
            else:
                differing += loose.token_ids != wanted.token_ids
            if name == "endless grammar":
                assert re.fullmatch("((ab|ba)*[ab]?)", loose.text), name
    assert differing > 0
    sampled = {
        "temperature": 2.0,
        "seed": 4,
        "ignore_eos": True,
        "max_new_tokens": 40,
        "frequency_penalty": 0.2,
        "allowed_token_ids": tuple(range(65, 75)),
        "options": {"logprobs": LogprobOptions(num_top=2)},
    }
    expected = ask(plain, **sampled)
    accepted = []
    for llm in (at_one, lossy):
        # Guesses that greedy decoding finds right: often likely, rarely what is drawn.
        consult(llm, Oracle(ask(plain, **{**sampled, "temperature": 0.0}), 1))
        found = ask(llm, **sampled)
        for one in found:
            assert set(one.token_ids) <= set(sampled["allowed_token_ids"])
            assert len(one.token_ids) == len(one.logprobs.of_tokens()) == 40
        accepted.append(sum(one.speculated.num_accepted for one in found if one.speculated))
        if llm is at_one:
            assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert accepted[1] > accepted[0]
    for llm in (plain, at_one, lossy):
        assert llm.stats().num_leased_pages == 0


def check_figures(got: Sample, wanted: Sample, *, atol: float) -> None:
    """In 8 bits, a last bit may decide to which number a key is rounded; then `atol` is large."""
    np.testing.assert_allclose(got.logprobs.of_tokens(), wanted.logprobs.of_tokens(), atol=atol)
    for ours, others in zip(
        got.logprobs.of_likeliest(), wanted.logprobs.of_likeliest(), strict=True
    ):
        top, wanted_top = ([logprob for logprob, _ in place] for place in (ours, others))
        np.testing.assert_allclose(top, wanted_top, atol=atol)
        assert atol > 1e-3 or [pair[1] for pair in ours] == [pair[1] for pair in others]
    assert got.hidden_states.shape == wanted.hidden_states.shape
    np.testing.assert_allclose(got.hidden_states, wanted.hidden_states, atol=10 * atol)


def test_repetition_needs_fewer_steps(make_llm: Make) -> None:
    llm = make_llm(**NGRAM)
    asked = {"ignore_eos": True, "max_new_tokens": 100, "allowed_token_ids": (65,)}
    assert [sample.token_ids for sample in ask(llm, **asked)] == [[65] * 100] * len(PROMPTS)
    stats = llm.stats()
    assert stats.speculated is not None
    assert stats.speculated.accept_length > 5
    assert stats.num_steps < 40


def test_many_requests_at_once_get_no_guesses(make_llm: Make) -> None:
    llm = make_llm(**NGRAM, speculative_max_step_tokens=6)
    ask(llm, ignore_eos=True, max_new_tokens=30)
    stats = llm.stats()
    assert stats.speculated is not None
    assert stats.speculated.num_drafted < 2 * stats.num_steps


def test_the_figures_are_told_over_http(make_llm: Make) -> None:
    llm = make_llm(**NGRAM)

    async def call() -> tuple[Any, Any]:
        transport = httpx.ASGITransport(create_app(llm.services))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {
                "input_ids": PROMPTS[0],
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": 50,
                    "ignore_eos": True,
                    "allowed_token_ids": [65],
                },
            }
            answer = (await client.post("/generate", json=body)).json()
            loads = (await client.get("/v1/loads", params={"include": "spec"})).json()
            return answer["meta_info"], loads

    meta, loads = llm.run(call())
    assert meta["spec_accept_length"] * meta["spec_verify_ct"] == pytest.approx(50)
    assert meta["spec_verify_ct"] + meta["spec_accept_token_num"] == 50
    assert 0 < meta["spec_accept_rate"] <= 1
    assert meta["spec_accept_token_num"] <= meta["spec_draft_token_num"]
    [load] = loads["loads"]
    assert load["speculative"]["accept_length"] > 1
