"""LoRA adapters that begin in the middle of a prompt: what peft says, and the base's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sapwood import LLM
from sapwood.app.converting import merge_adapter
from sapwood.base.errors import ConfigError, InvalidRequest
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.model import ModelConfig
from sapwood.store import Silent
from tests.adapters import ACTIVATED, INVOCATION, LogProbs, save_adapters
from tests.app.building.test_adapters import CLOSE, NUM_OUTPUTS, ask, named
from tests.app.llms import llms_of
from tests.app.test_logprobs import Result
from tests.app.test_schedule_independence import kernels_here
from tests.app.test_windows import text
from tests.tiers import sweep
from tests.tiny import save_qwen3

PAGE = 4


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("model") / "model", hidden_size=64)


@pytest.fixture(scope="module")
def saved(
    model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], LogProbs]:
    return save_adapters(model_path, tmp_path_factory.mktemp("adapters"), ACTIVATED)


@pytest.fixture
def make_llm(
    model_path: Path, saved: tuple[dict[str, Path], LogProbs]
) -> Iterator[Callable[..., LLM]]:
    with llms_of(
        model_path,
        page_size=PAGE,
        max_total_tokens=2048,
        max_running_requests=12,
        kernels=kernels_here()[0],
        lora_paths=named(saved[0]),
    ) as make:
        yield make


def without(seed: int, length: int) -> list[int]:
    """Text without the invocations' tokens."""
    return [token if token not in INVOCATION else token + 20 for token in text(length, seed=seed)]


def prompts() -> list[list[int]]:
    """Without an invocation, and with one or more: at the beginning, the end, and between."""
    return [
        without(0, 11),
        INVOCATION + without(1, 9),
        without(2, 17) + INVOCATION,
        without(3, 6) + INVOCATION + without(4, 5) + INVOCATION + without(5, 8),
        [*without(6, 13), 7, 3, 7, 3, 7, *without(7, 2)],
        [*without(8, 3), 7, 3],
    ]


def check(result: Result, adapter: str, prompt: list[int], reference: LogProbs) -> None:
    """As peft computes the answer from the prompt: it looks for invocations once."""
    output = result.token_ids
    invocation = ACTIVATED.get(adapter, {}).get("alora_invocation_tokens")
    if invocation is not None and any(token in invocation for token in output):
        output = output[: next(i for i, token in enumerate(output) if token in invocation)]
    if not output:
        return
    expected = reference(adapter, prompt + output)[len(prompt) - 1 : -1]
    told = torch.tensor(result.logprobs.of_tokens()[: len(output)])
    assert (told - expected.gather(-1, torch.tensor(output)[:, None])[:, 0]).abs().max() < CLOSE
    assert expected.argmax(-1).tolist() == output


@sweep(strength=1, kernels=kernels_here(), depth=[1, 2], chunk=[5, -1])
def test_tokens_before_the_invocation_are_the_bases(
    make_llm: Callable[..., LLM],
    saved: tuple[dict[str, Path], LogProbs],
    kernels: str,
    depth: int,
    chunk: int,
) -> None:
    """All at once with the base, and again from hits; log probabilities of prompts, too."""
    llm = make_llm(kernels=kernels, overlap_depth=depth, chunked_prefill_size=chunk)
    reference = saved[1]
    asked = [(name, prompt) for prompt in prompts() for name in ["", *ACTIVATED]]
    for prompt_start in (None, None, 0):
        results = ask(llm, asked, prompt_start=prompt_start)
        for (adapter, prompt), result in zip(asked, results, strict=True):
            check(result, adapter, prompt, reference)
            if prompt_start is not None:
                expected = reference(adapter, prompt)[:-1]
                targets = torch.tensor(prompt[1:])[:, None]
                told = torch.tensor(result.prompt.logprobs.of_tokens())
                assert (told - expected.gather(-1, targets)[:, 0]).abs().max() < CLOSE
    assert llm.stats().num_leased_pages == 0


def cached(llm: LLM, adapter: str, prompt: list[int]) -> int:
    (result,) = ask(llm, [(adapter, prompt)])
    found = result.chunks[-1].num_cached_tokens
    assert found is not None
    return found


def test_what_comes_before_is_cached_for_all(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    turn = without(9, 22)
    assert cached(llm, "", turn) == 0
    asked = turn + INVOCATION + without(10, 10)
    assert cached(llm, "activated", asked) == 20, "of the base's turn"
    assert cached(llm, "activated", asked) == 32
    assert cached(llm, "", asked) == 20, "not what the adapter computed"
    assert cached(llm, "plain", asked) == 0
    turn = without(11, 18)
    asked = turn + INVOCATION + without(10, 10)
    assert cached(llm, "activated", asked) == 0
    assert cached(llm, "", turn + without(12, 9)) == 16, "of the adapter's turn"
    assert cached(llm, "with outputs", asked) == 16
    never = without(13, 30)
    assert cached(llm, "activated", never) == 0
    assert cached(llm, "", never) == 28, "without an invocation all is the base's"


def test_retraction(make_llm: Callable[..., LLM], saved: tuple[dict[str, Path], LogProbs]) -> None:
    llm = make_llm(max_total_tokens=160, schedule_conservativeness=0.0, context_length=96)
    asked = [
        ("activated", without(seed, 14) + INVOCATION + without(seed + 20, 3)) for seed in range(8)
    ]
    results = ask(llm, asked, max_new_tokens=40)
    for (adapter, prompt), result in zip(asked, results, strict=True):
        assert len(result.token_ids) == 40
        check(result, adapter, prompt, saved[1])
    assert llm.stats().num_retractions > 0


def test_with_guesses(
    make_llm: Callable[..., LLM], saved: tuple[dict[str, Path], LogProbs]
) -> None:
    llm = make_llm(speculative_algorithm="NGRAM", disable_speculative_adaptation=True)
    prompt = without(5, 6) * 3 + INVOCATION + without(5, 6) * 2
    for result in ask(llm, [("activated", prompt)], n=2, max_new_tokens=2 * NUM_OUTPUTS):
        check(result, "activated", prompt, saved[1])


def test_what_cannot_be_is_refused(
    make_llm: Callable[..., LLM],
    model_path: Path,
    saved: tuple[dict[str, Path], LogProbs],
    tmp_path: Path,
) -> None:
    llm = make_llm()
    embedding = {
        "embedding": {
            "r": 2,
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "alora_invocation_tokens": INVOCATION,
        }
    }
    paths, _ = save_adapters(model_path, tmp_path / "adapters", embedding)
    with pytest.raises(InvalidRequest, match="alora_invocation_tokens and an adapter of"):
        llm.load_lora_adapter("embedding", paths["embedding"])
    with pytest.raises(ConfigError, match="alora_invocation_tokens"):
        merge_adapter(
            EngineConfig(model=ModelConfig(model=str(model_path))),
            str(saved[0]["activated"]),
            tmp_path / "merged",
            force=False,
            home=tmp_path / "home",
            progress=Silent(),
        )
