"""Layers that keep a state: an engine says what transformers says, wherever prompts and chunks end,
however few states there are, and whoever had a slot before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sapwood import LLM
from sapwood.app.building.resolving import resolve_config
from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.text.generation import TextRequest
from tests.app.llms import llms_of
from tests.app.test_logprobs import ask
from tests.app.test_schedule_independence import kernels_here
from tests.app.test_windows import NUM_OUTPUTS, Reference, check, text
from tests.tiers import sweep
from tests.tiny import save_lfm2

PAGE, INTERVAL = 4, 12


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lfm2(tmp_path_factory.mktemp("lfm2") / "model")


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Reference:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def of(token_ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([token_ids])).logits[0].double().log_softmax(-1)

    return of


@pytest.fixture
def make_llm(model_path: Path) -> Iterator[Callable[..., LLM]]:
    with llms_of(
        model_path,
        page_size=PAGE,
        max_running_requests=3,
        chunked_prefill_size=7,
        mamba_track_interval=INTERVAL,
        kernels=kernels_here()[0],
    ) as make:
        yield make


@sweep(kernels=kernels_here(), depth=[1, 2], chunk=[5, 12, -1])
def test_beside_others_and_from_hits(
    make_llm: Callable[..., LLM], reference: Reference, kernels: str, depth: int, chunk: int
) -> None:
    llm = make_llm(kernels=kernels, overlap_depth=depth, chunked_prefill_size=chunk)
    stem = text(61, seed=1)
    prompts = [text(90, seed=2), stem + text(9, seed=3), text(3, seed=4), stem + text(30, seed=5)]
    for _ in range(2):
        for prompt, result in zip(
            prompts, ask(llm, prompts, None, max_new_tokens=NUM_OUTPUTS), strict=True
        ):
            check(result, prompt, reference)
    stats = llm.stats()
    assert stats.num_leased_pages == 0
    assert stats.num_cached_tokens > 2 * 60 + 80, "later prompts went on from kept states"


@sweep(strength=1, chunk=[1, 5, 64], interval=[PAGE, INTERVAL], depth=[1, 2])
def test_wherever_a_prompt_ends(
    make_llm: Callable[..., LLM], reference: Reference, chunk: int, interval: int, depth: int
) -> None:
    """One token short of a page or of a kept state, exactly there, and one more; each prompt also
    as a prefix of the next, and a second time."""
    llm = make_llm(chunked_prefill_size=chunk, mamba_track_interval=interval, overlap_depth=depth)
    whole = text(2 * INTERVAL + 2, seed=6)
    lengths = [1, 2, PAGE - 1, PAGE, PAGE + 1, INTERVAL - 1, INTERVAL, INTERVAL + 1, 2 * INTERVAL]
    for length in [*lengths, 2 * INTERVAL + 1, *lengths]:
        (result,) = ask(llm, [whole[:length]], None, max_new_tokens=NUM_OUTPUTS)
        check(result, whole[:length], reference)
    (again,) = ask(llm, [whole[: 2 * INTERVAL + 1]], None, max_new_tokens=NUM_OUTPUTS)
    assert again.chunks[-1].num_cached_tokens == 2 * INTERVAL, "a state is kept at a prompt's end"


def test_a_conversation_goes_on_from_the_last_prompt(
    make_llm: Callable[..., LLM], reference: Reference
) -> None:
    llm = make_llm(mamba_track_interval=1024)
    prompt = text(41, seed=7)
    for turn in range(3):
        (result,) = ask(llm, [prompt], None, max_new_tokens=NUM_OUTPUTS)
        check(result, prompt, reference)
        assert (result.chunks[-1].num_cached_tokens > 30) == (turn > 0)
        answer = [min(token_id, 255) for token_id in result.token_ids[:20]]  # no special ones
        prompt = prompt + answer + text(9, seed=turn)


def test_samples_of_one_prompt(make_llm: Callable[..., LLM], reference: Reference) -> None:
    llm = make_llm()
    prompt = text(66, seed=8)
    for result in ask(llm, [prompt], None, max_new_tokens=NUM_OUTPUTS, n=3):
        check(result, prompt, reference)
    assert llm.stats().num_cached_tokens >= 2 * 36


@sweep(num_states=[1, 2, 4], depth=[1, 2])
def test_few_states(
    make_llm: Callable[..., LLM], reference: Reference, num_states: int, depth: int
) -> None:
    llm = make_llm(max_mamba_cache_size=num_states, overlap_depth=depth)
    stem = text(30, seed=9)
    prompts = [stem + text(length, seed=length) for length in (2, 9, 17)]
    for _ in range(2):
        for prompt, result in zip(
            prompts, ask(llm, prompts, None, max_new_tokens=NUM_OUTPUTS), strict=True
        ):
            check(result, prompt, reference)
    assert llm.stats().num_leased_pages == 0


@sweep(strength=1, depth=[1, 2], keeps_prefixes=[True, False])
def test_retracted_requests_go_on(
    make_llm: Callable[..., LLM], reference: Reference, depth: int, keeps_prefixes: bool
) -> None:
    llm = make_llm(
        max_total_tokens=160,
        schedule_conservativeness=0.0,
        overlap_depth=depth,
        disable_radix_cache=not keeps_prefixes,
    )
    prompts = [text(60 + 5 * index, seed=20 + index) for index in range(3)]
    results = ask(llm, prompts, None, max_new_tokens=NUM_OUTPUTS)
    for prompt, result in zip(prompts, results, strict=True):
        check(result, prompt, reference)
    stats = llm.stats()
    assert stats.num_leased_pages == 0
    assert stats.num_retractions > 0


@pytest.mark.parametrize("options", [{}, {"quantization": "w8a8_int8"}, {"disable_graphs": True}])
def test_in_bfloat16(
    make_llm: Callable[..., LLM], reference: Reference, options: dict[str, Any]
) -> None:
    """Rounding may choose other tokens; what is told of them is nearly what fp32 says."""
    llm = make_llm(dtype="bfloat16", **options)
    prompt = text(61, seed=1)
    for round_number in range(2):
        (result,) = ask(llm, [prompt], None, max_new_tokens=NUM_OUTPUTS)
        output = torch.tensor(result.token_ids)
        expected = reference(prompt + result.token_ids)[len(prompt) - 1 : -1]
        told = torch.tensor(result.logprobs.of_tokens())
        error = told - expected.gather(-1, output[:, None])[:, 0]
        assert error.square().mean().sqrt() < 0.1
        assert (llm.stats().num_cached_tokens == 60) == (round_number == 1)


def test_a_slot_of_an_aborted_request_begins_anew(
    make_llm: Callable[..., LLM], reference: Reference
) -> None:
    llm = make_llm(max_running_requests=1, max_mamba_cache_size=1)
    sampling = SamplingParams(temperature=0.0, max_new_tokens=100, ignore_eos=True)

    async def leave_early(prompt: list[int]) -> None:
        request = TextRequest(
            request_id="left", prompt=prompt, options=RequestOptions(sampling=sampling)
        )
        async for chunk in llm.services.generator.generate(request):
            if chunk.token_ids:
                await llm.services.generator.abort("left")

    for length in (1, 30, 47):
        llm.run(asyncio.wait_for(leave_early(text(length, seed=length)), 60))
        prompt = text(length + 1, seed=90 + length)
        (result,) = ask(llm, [prompt], None, max_new_tokens=NUM_OUTPUTS)
        check(result, prompt, reference)


def test_pages_and_states_are_explained(model_path: Path) -> None:
    def resolved(**options: Any) -> dict[str, str]:
        asked = EngineConfig.of({"model": str(model_path), "page_size": 16, **options})
        return {one.option: one.reason for one in resolve_config(asked, home=model_path).decisions}

    reasons = resolved(max_total_tokens=4096, max_running_requests=3)
    assert (
        "all 4096 tokens in 1 layer, 0.5 MiB; 19 states in 3 layers, 0.0 MiB: 3 for running "
        "requests, and 16 for prefixes, every 256 tokens and at the end of each prompt"
        in reasons["max_total_tokens"]
    )
    assert "a step of a prompt ends there" in reasons["mamba_track_interval"]
    with pytest.raises(ConfigError, match=r"must be a multiple of --page-size 16"):
        resolved(mamba_track_interval=24)
