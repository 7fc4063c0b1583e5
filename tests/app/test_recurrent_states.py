"""Layers with a recurrent matrix: an engine says what transformers says from every kept state, in
a slot that others had before, and computes little of a conversation's next turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sapwood import LLM
from sapwood.base.errors import ConfigError
from tests.app.llms import llms_of
from tests.app.test_logprobs import ask
from tests.app.test_schedule_independence import kernels_here
from tests.app.test_windows import NUM_OUTPUTS, Reference, check, text
from tests.tiers import sweep
from tests.tiny import save_lfm2, save_qwen3_5

PAGE = 4
LONG = 2000
"""Tokens of a conversation's first turn."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen3_5") / "model"
    return save_qwen3_5(directory, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Reference:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def of(token_ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].double().log_softmax(-1)

    return of


@pytest.fixture
def make_llm(model_path: Path) -> Iterator[Callable[..., LLM]]:
    with llms_of(
        model_path,
        page_size=PAGE,
        max_running_requests=3,
        chunked_prefill_size=7,
        mamba_track_interval=PAGE,
        kernels=kernels_here()[0],
    ) as make:
        yield make


@sweep(strength=1, kernels=kernels_here(), depth=[1, 2])
def test_a_hit_at_every_kept_position(
    make_llm: Callable[..., LLM], reference: Reference, kernels: str, depth: int
) -> None:
    llm = make_llm(kernels=kernels, overlap_depth=depth, max_mamba_cache_size=40)
    whole = text(8 * PAGE + 1, seed=1)
    ask(llm, [whole], None, max_new_tokens=1)
    for kept in range(PAGE, 8 * PAGE + 1, PAGE):
        prompt = whole[:kept] + text(5, seed=kept)
        (result,) = ask(llm, [prompt], None, max_new_tokens=NUM_OUTPUTS)
        check(result, prompt, reference)
        assert result.chunks[-1].num_cached_tokens == kept


@pytest.mark.parametrize("depth", [1, 2])
def test_slots_of_retracted_and_finished_requests(
    make_llm: Callable[..., LLM], reference: Reference, depth: int
) -> None:
    llm = make_llm(
        max_total_tokens=160,
        schedule_conservativeness=0.0,
        overlap_depth=depth,
        max_mamba_cache_size=3,
    )
    prompts = [text(60 + 5 * index, seed=20 + index) for index in range(3)]
    for _ in range(2):
        results = ask(llm, prompts, None, max_new_tokens=NUM_OUTPUTS)
        for prompt, result in zip(prompts, results, strict=True):
            check(result, prompt, reference)
    stats = llm.stats()
    assert stats.num_leased_pages == 0
    assert stats.num_retractions > 0


@pytest.mark.parametrize("depth", [1, 2])
def test_samples_of_one_prompt(
    make_llm: Callable[..., LLM], reference: Reference, depth: int
) -> None:
    llm, prompt = make_llm(overlap_depth=depth), text(66, seed=8)
    for result in ask(llm, [prompt], None, max_new_tokens=NUM_OUTPUTS, n=3):
        check(result, prompt, reference)


def test_the_next_turn_of_a_conversation_computes_little(make_llm: Callable[..., LLM]) -> None:
    """With the default distance of kept states; the output is that without prefixes."""
    options = {
        "page_size": 16,
        "max_total_tokens": 8192,
        "chunked_prefill_size": 512,
        "mamba_track_interval": None,
    }
    llm, fresh = make_llm(**options), make_llm(**options, disable_radix_cache=True)
    first = text(LONG, seed=9)
    (result,) = ask(llm, [first], None, max_new_tokens=NUM_OUTPUTS)
    answer = [min(token_id, 255) for token_id in result.token_ids]  # no special ones
    second = first + answer + text(30, seed=10)
    (again,) = ask(llm, [second], None, max_new_tokens=NUM_OUTPUTS)
    (expected,) = ask(fresh, [second], None, max_new_tokens=NUM_OUTPUTS)
    assert again.token_ids == expected.token_ids
    computed = len(second) - again.chunks[-1].num_cached_tokens
    assert computed < 0.15 * len(second)


def test_states_in_bfloat16_are_nearly_right(
    make_llm: Callable[..., LLM], reference: Reference
) -> None:
    llm, prompt = make_llm(mamba_ssm_dtype="bfloat16"), text(61, seed=1)
    for _ in range(2):
        (result,) = ask(llm, [prompt], None, max_new_tokens=NUM_OUTPUTS)
        output = torch.tensor(result.token_ids)
        expected = reference(prompt + result.token_ids)[len(prompt) - 1 : -1]
        told = torch.tensor(result.logprobs.of_tokens())
        error = told - expected.gather(-1, output[:, None])[:, 0]
        assert error.abs().max() > 1e-5, "states are rounded"
        assert error.square().mean().sqrt() < 0.1


def test_without_buffers_states_are_kept_at_ends_of_prompts_only(
    make_llm: Callable[..., LLM], reference: Reference
) -> None:
    llm = make_llm(mamba_scheduler_strategy="no_buffer", mamba_track_interval=None)
    whole = text(30, seed=2)
    for length, cached in ((30, 0), (20, 0), (30, 28), (25, 20)):
        prompt = whole[:length] + text(3, seed=length)
        if cached:  # a turn that goes on from the end of an earlier prompt
            prompt = [*prompt, *text(9, seed=length)]
        (result,) = ask(llm, [prompt], None, max_new_tokens=NUM_OUTPUTS)
        check(result, prompt, reference)
        assert (result.chunks[-1].num_cached_tokens > 0) == (cached > 0)


def test_options_without_meaning_are_refused(make_llm: Callable[..., LLM], tmp_path: Path) -> None:
    path = save_lfm2(tmp_path / "lfm2")
    with pytest.raises(ConfigError, match="keep no recurrent states"):
        make_llm(path, mamba_ssm_dtype="bfloat16")
