"""Log probabilities of a whole engine are transformers', however the steps are cut."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sapwood import LLM
from sapwood.executor.sampling import logprobs as recorder
from sapwood.executor.sampling.custom import LOGITS_PROCESSORS
from sapwood.schema.logprobs import LogprobOptions, TokenLogprobs
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.text.generation import ScoredPrompt, TextChunk, TextRequest
from tests.app.llms import llms_of
from tests.tiny import save_qwen3

CLOSE = 1e-3
ASKED = (3, 77, 255)
Reference = Callable[[Sequence[int]], torch.Tensor]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Reference:
    """Token ids -> [n, vocab]: transformers' log probabilities of what follows each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def of(token_ids: Sequence[int]) -> torch.Tensor:
        return model(torch.tensor([list(token_ids)])).logits[0].double().log_softmax(-1)

    return of


@pytest.fixture
def make_llm(model_path: Path) -> Iterator[Callable[..., LLM]]:
    with llms_of(model_path, page_size=4) as make:
        yield make


@dataclass
class Result:
    """One sample, its chunks joined."""

    chunks: list[TextChunk]

    @property
    def token_ids(self) -> list[int]:
        return [one for chunk in self.chunks for one in chunk.token_ids]

    @property
    def logprobs(self) -> TokenLogprobs:
        return TokenLogprobs.joined([one.logprobs for one in self.chunks if one.logprobs])

    @property
    def prompt(self) -> ScoredPrompt | None:
        told = [chunk.prompt for chunk in self.chunks if chunk.prompt is not None]
        assert len(told) <= 1
        return told[0] if told else None


def ask(llm: LLM, prompts: Sequence[list[int]], start: int | None, **options: Any) -> list[Result]:
    """All prompts at once; each of n samples is a result."""
    n = options.pop("n", 1)
    params = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True, **options}

    async def one(index: int, prompt: list[int]) -> list[Result]:
        request = TextRequest(
            request_id=f"r{index}",
            prompt=prompt,
            options=RequestOptions(
                sampling=SamplingParams(**params),
                logprobs=LogprobOptions(prompt_start=start, num_top=3, token_ids=ASKED),
            ),
            n=n,
        )
        found = [Result([]) for _ in range(n)]
        async for chunk in llm.services.generator.generate(request):
            assert chunk.finish is None or chunk.finish.kind != "error", chunk.finish
            found[chunk.index].chunks.append(chunk)
        return found

    async def every() -> list[Result]:
        each = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
        return [result for results in each for result in results]

    return llm.run(every())


def check(result: Result, prompt: list[int], start: int | None, reference: Reference) -> None:
    output = result.token_ids
    expected = reference(prompt + output)
    compare(result.logprobs, output, expected[len(prompt) - 1 : -1])
    if start is None:
        assert result.prompt is None
        return
    assert result.prompt is not None
    assert list(result.prompt.token_ids) == prompt[start:]
    after = prompt[start + 1 :]
    if after:
        assert result.prompt.logprobs is not None
        compare(result.prompt.logprobs, after, expected[start : len(prompt) - 1])


def compare(got: TokenLogprobs, token_ids: Sequence[int], expected: torch.Tensor) -> None:
    assert len(got) == len(token_ids) == len(expected)
    tokens = expected.gather(-1, torch.tensor(token_ids)[:, None])[:, 0]
    assert (torch.tensor(got.of_tokens()) - tokens).abs().max() < CLOSE
    assert (torch.tensor(got.of_chosen()) - expected[:, ASKED]).abs().max() < CLOSE
    likeliest = torch.tensor(got.of_likeliest())  # [n, 3, (log probability, id)]
    values = expected.topk(3).values
    assert (likeliest[..., 0] - values).abs().max() < CLOSE
    # Its ids are those whose log probabilities it tells.
    there = expected.gather(-1, likeliest[..., 1].long())
    assert (likeliest[..., 0] - there).abs().max() < CLOSE


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (one,), generator=generator).tolist() for one in lengths]


@pytest.mark.parametrize("start", [None, 0, 7, 29])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunked_prefill_size": 5},
        {"chunked_prefill_size": 5, "overlap_depth": 2},
        {"kernels": "torch", "chunked_prefill_size": 16},
    ],
    ids=["whole", "chunks", "overlap", "torch"],
)
def test_they_are_transformers(
    make_llm: Callable[..., LLM], reference: Reference, options: dict[str, Any], start: int | None
) -> None:
    asked = prompts(30, 41, 33)
    llm = make_llm(**options)
    for result, prompt in zip(ask(llm, asked, start), asked, strict=True):
        check(result, prompt, start, reference)


def test_a_long_prompts_logits_are_never_all_there(
    make_llm: Callable[..., LLM], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = recorder.LogprobRecorder.__init__.__kwdefaults__ | {"piece_bytes": 4000}
    monkeypatch.setattr(recorder.LogprobRecorder.__init__, "__kwdefaults__", defaults)
    llm = make_llm()
    [prompt] = prompts(60)
    largest = []
    measure = recorder.LogprobRecorder._measure
    monkeypatch.setattr(
        recorder.LogprobRecorder,
        "_measure",
        lambda one, logits, *rest: largest.append(len(logits)) or measure(one, logits, *rest),
    )
    [result] = ask(llm, [prompt], 0)
    check(result, prompt, 0, reference)
    assert max(largest) == 3


@pytest.mark.parametrize("start", [0, 13, 39, None])
def test_a_hit_ends_where_they_begin(
    make_llm: Callable[..., LLM], reference: Reference, start: int | None
) -> None:
    llm = make_llm()
    [prompt] = prompts(40)
    ask(llm, [prompt], None)
    [result] = ask(llm, [prompt], start)
    check(result, prompt, start, reference)
    covered = 39 if start is None else start
    assert result.chunks[0].num_cached_tokens == covered // 4 * 4


@pytest.mark.parametrize("depth", [1, 2])
def test_they_survive_retractions(
    make_llm: Callable[..., LLM], reference: Reference, depth: int
) -> None:
    llm = make_llm(
        max_total_tokens=128,
        chunked_prefill_size=8,
        schedule_conservativeness=0.0,
        overlap_depth=depth,
    )
    asked = prompts(20, 21, 22, 23, 24)
    results = ask(llm, asked, 2, max_new_tokens=24)
    assert llm.stats().num_retractions > 0
    for result, prompt in zip(results, asked, strict=True):
        assert len(result.token_ids) == 24
        check(result, prompt, 2, reference)
    assert llm.stats().num_leased_pages == 0


def test_samples_share_the_prompts_pages(
    make_llm: Callable[..., LLM], reference: Reference
) -> None:
    llm = make_llm()
    [prompt] = prompts(80)
    results = ask(llm, [prompt], None, n=5, temperature=1.0, seed=3)
    assert len({tuple(result.token_ids) for result in results}) > 1
    for result in results:
        check(result, prompt, None, reference)
    # The prompt once; of the other samples only the page with its last token, and the output.
    assert llm.stats().num_computed_tokens <= 80 + 4 * 4 + 5 * 8


def test_they_are_the_models_own_whatever_changes_the_choice(
    make_llm: Callable[..., LLM], reference: Reference
) -> None:
    llm = make_llm()
    [prompt] = prompts(12)
    changes: list[dict[str, Any]] = [
        {"temperature": 2.0, "top_k": 50, "seed": 1},
        {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "presence_penalty": 1.0},
        {"logit_bias": {5: 100.0}},
        {"custom_logit_processor": "disallowed_tokens", "custom_params": {"token_ids": [1, 2]}},
    ]
    for changed in changes:
        [result] = ask(llm, [prompt], None, **changed)
        check(result, prompt, None, reference)


def test_a_stop_cuts_them_off_with_the_tokens(
    make_llm: Callable[..., LLM], reference: Reference
) -> None:
    llm = make_llm()
    [prompt] = prompts(12)
    [whole] = ask(llm, [prompt], None, max_new_tokens=30)
    # What could be a stop: a token in the middle whose text is one ASCII character.
    names = [llm.services.tokenizer.decode([one]) for one in whole.token_ids]
    stop = next(one for one in names[2:] if one.isascii() and one.isprintable() and one)
    at = names.index(stop)
    [result] = ask(llm, [prompt], None, max_new_tokens=30, stop=(stop,))
    assert result.token_ids == whole.token_ids[: at + 1]
    check(result, prompt, None, reference)


def test_a_failing_processor_ends_its_request_only(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_left(params: Any, prompt_ids: Any) -> Callable[[torch.Tensor, Any], None]:
        def process(logits: torch.Tensor, output_ids: Any) -> None:
            logits.fill_(-torch.inf)

        return process

    monkeypatch.setattr(LOGITS_PROCESSORS, "get", lambda name: nothing_left)
    llm = make_llm()
    first, second = prompts(10, 11)
    params = {
        "custom_logit_processor": "disallowed_tokens",
        "custom_params": {"token_ids": [1]},
    }

    async def last(index: int, prompt: list[int], **sampling: Any) -> TextChunk:
        request = TextRequest(
            request_id=f"f{index}",
            prompt=prompt,
            options=RequestOptions(sampling=SamplingParams(max_new_tokens=6, **sampling)),
        )
        chunks = [chunk async for chunk in llm.services.generator.generate(request)]
        return chunks[-1]

    async def both() -> list[TextChunk]:
        return await asyncio.gather(last(0, first, **params), last(1, second))

    bad, good = llm.run(both())
    assert bad.finish is not None
    assert (bad.finish.kind, bad.finish.status) == ("error", 400)
    assert "left no token" in (bad.finish.message or "")
    assert good.finish is not None
    assert good.finish.kind in ("length", "stop")
    assert llm.stats().num_leased_pages == 0
