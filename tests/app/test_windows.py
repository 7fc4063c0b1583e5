"""Layers that see a window of the context: an engine says what transformers says, far beyond the
window, while the pages behind it are given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from sapwood import LLM
from sapwood.app.building.resolving import resolve_config
from sapwood.base.errors import ConfigError
from sapwood.engine.scheduler import Scheduler
from sapwood.kernels.registry import IMPLEMENTATIONS, Need, select_kernels
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.step import StepPlan
from tests.app.llms import llms_of
from tests.app.test_logprobs import Result, ask
from tests.tiers import long_only
from tests.tiny import VOCAB, write_tokenizer

CLOSE = 1e-4
WINDOW = 16
NUM_OUTPUTS = 50
MODELS: dict[str, dict[str, Any]] = {
    "every layer has a window": {"model_type": "mistral"},
    "some layers have a window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "max_window_layers": 2,
    },
    "layers take turns": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "some layers have chunks": {
        "model_type": "llama4_text",
        "attention_chunk_size": WINDOW,
        "no_rope_layers": [1, 0, 1, 0],
        "floor_scale": 10,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
    },
}
Reference = Callable[[list[int]], torch.Tensor]


def save(directory: Path, model_type: str, **fields: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        sliding_window=WINDOW,
        **fields,
    )
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name
        parameter.data = 1 + 0.2 * noise if is_norm else noise * parameter.shape[-1] ** -0.5
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module", params=MODELS)
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("windowed"), **MODELS[request.param])


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Reference:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def of(token_ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([token_ids])).logits[0].double().log_softmax(-1)

    return of


def kernels_with_windows() -> list[Any]:
    """Those that support windows; the reference, which is slow and to which the others' own tests
    compare them, only at full size."""
    need = Need(
        device="cpu",
        dtype=torch.float32,
        head_dim=32,
        page_size=4,
        attention=frozenset({"sliding window"}),
    )
    found = []
    for name in IMPLEMENTATIONS:
        with suppress(ConfigError):
            select_kernels(need, name)
            found.append(name)
    return [*long_only("reference"), *(name for name in found if name != "reference")]


@pytest.fixture(params=kernels_with_windows())
def make_llm(request: pytest.FixtureRequest, model_path: Path) -> Iterator[Callable[..., LLM]]:
    with llms_of(
        model_path,
        page_size=4,
        max_running_requests=3,
        chunked_prefill_size=12,
        kernels=request.param,
    ) as make:
        yield make


def text(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def check(result: Result, prompt: list[int], reference: Reference) -> None:
    output = result.token_ids
    assert len(output) == NUM_OUTPUTS
    expected = reference(prompt + output)[len(prompt) - 1 : -1]
    told = torch.tensor(result.logprobs.of_tokens())
    assert (told - expected.gather(-1, torch.tensor(output)[:, None])[:, 0]).abs().max() < CLOSE
    assert expected.argmax(-1).tolist() == output


def test_far_beyond_the_window_beside_others_and_from_hits(
    make_llm: Callable[..., LLM], reference: Reference
) -> None:
    llm = make_llm()
    stem = text(61, seed=1)
    prompts = [text(90, seed=2), stem + text(9, seed=3), text(3, seed=4), stem + text(30, seed=5)]
    for _ in range(2):
        results = ask(llm, prompts, None, max_new_tokens=NUM_OUTPUTS)
        for prompt, result in zip(prompts, results, strict=True):
            check(result, prompt, reference)
    stats = llm.stats()
    assert stats.num_leased_pages == 0
    assert stats.num_cached_tokens > 2 * 40, "later prompts went on from the cache"


def test_a_request_uses_more_pages_than_its_window_pool_has(
    make_llm: Callable[..., LLM], model_path: Path, reference: Reference
) -> None:
    """Of 140 tokens, whose pages would be 35, fewer than 15 fit into the pool at a time."""
    options = {"max_running_requests": 1, "max_total_tokens": 160, "chunked_prefill_size": 12}
    prompt = text(90, seed=7)
    (result,) = ask(make_llm(**options), [prompt], None, max_new_tokens=NUM_OUTPUTS)
    check(result, prompt, reference)
    asked = EngineConfig.of({"model": str(model_path), "page_size": 4, **options})
    resolved = resolve_config(asked, home=model_path)
    assert 0 < min(resolved.pool_sizes) < 15
    if len(resolved.pool_sizes) > 1:
        (decision,) = [one for one in resolved.decisions if one.option == "max_total_tokens"]
        assert "asked for; all 160 tokens in 2 layers, 0.0 MiB; " in decision.reason
        assert " tokens for windows of 16 in 2 layers" in decision.reason


def test_a_chunk_must_be_whole_pages(tmp_path: Path) -> None:
    path = save(tmp_path, **MODELS["some layers have chunks"])
    asked = EngineConfig.of({"model": str(path), "page_size": 32})
    with pytest.raises(ConfigError, match=r"chunks of 16 tokens.*--page-size that divides 16"):
        resolve_config(asked, home=path)


def test_requests_are_retracted_when_windows_do_not_fit(
    make_llm: Callable[..., LLM], reference: Reference
) -> None:
    llm = make_llm(max_total_tokens=160, schedule_conservativeness=0.0)
    prompts = [text(60 + 5 * index, seed=20 + index) for index in range(3)]
    results = ask(llm, prompts, None, max_new_tokens=NUM_OUTPUTS)
    for prompt, result in zip(prompts, results, strict=True):
        check(result, prompt, reference)
    assert llm.stats().num_leased_pages == 0


def test_a_context_of_eight_windows_holds_the_pages_of_one(
    make_llm: Callable[..., LLM], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a window pool, while a prompt is computed in chunks and while its request decodes: a
    window, the new tokens, and a page."""
    held: list[tuple[int, int, int]] = []
    planned = Scheduler.plan

    def plan(scheduler: Scheduler) -> StepPlan | None:
        made = planned(scheduler)
        new = {} if made is None else {one.row: one.num_new for one in made.scheduled}
        for state in scheduler._running:
            assert state.lease is not None
            (window,) = state.lease.windows
            num_pages = len(window.pages) - window.first
            held.append((state.num_computed_tokens, new.get(state.row, 0), num_pages))
        return made

    monkeypatch.setattr(Scheduler, "plan", plan)
    page_size, chunk = 4, 12
    prompt = text(8 * WINDOW, seed=31)
    llm = make_llm(max_running_requests=2, page_size=page_size, chunked_prefill_size=chunk)
    for prompts in ([prompt], [prompt, text(8 * WINDOW, seed=32)]):
        for asked, result in zip(
            prompts, ask(llm, prompts, None, max_new_tokens=NUM_OUTPUTS), strict=True
        ):
            check(result, asked, reference)
    assert max(at for at, _, _ in held) > 10 * WINDOW
    assert {1, chunk} <= {num_new for _, num_new, _ in held}
    for at, num_new, num_pages in held:
        assert num_pages * page_size <= WINDOW + page_size + max(num_new, chunk), at
        if num_new == 1 and at > len(prompt):
            assert num_pages * page_size <= WINDOW + page_size, at


def test_a_warm_cache_says_what_a_cold_one_says(make_llm: Callable[..., LLM]) -> None:
    """The divergence of tokens' log probabilities, told while they were generated from hits, from
    those of the same text as a prompt that is computed whole."""
    llm = make_llm(max_total_tokens=1024, swa_full_tokens_ratio=1.0)
    prompts = [text(6 * WINDOW + 5 * index, seed=40 + index) for index in range(4)]
    ask(llm, prompts, None, max_new_tokens=2)
    before = llm.stats().num_cached_tokens
    warm = ask(llm, prompts, None, max_new_tokens=NUM_OUTPUTS, temperature=1.0, seed=3)
    assert llm.stats().num_cached_tokens - before > 4 * 4 * WINDOW
    assert llm.flush_cache()
    # An id that the tokenizer lacks would be no prompt.
    outputs = [[*takewhile(lambda one: one < VOCAB - 2, result.token_ids)] for result in warm]
    assert sum(map(len, outputs)) > 2 * NUM_OUTPUTS
    whole = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    cold = ask(llm, whole, 0, max_new_tokens=0)
    assert llm.stats().num_cached_tokens - before < 5 * 6 * WINDOW, "prompts are computed whole"
    for prompt, one, other in zip(prompts, warm, cold, strict=True):
        assert other.prompt is not None
        assert other.prompt.logprobs is not None
        told = torch.tensor(one.logprobs.of_tokens(), dtype=torch.float64)
        again = torch.tensor(other.prompt.logprobs.of_tokens()[len(prompt) - 1 :])
        ratio = again.double() - told[: len(again)]
        divergence = (ratio.exp() - 1 - ratio).mean()  # not negative, from single samples
        assert divergence < 1e-9
        assert ratio.abs().max() < CLOSE


def test_more_memory_for_windows_keeps_more_prefixes(
    make_llm: Callable[..., LLM], model_path: Path, reference: Reference
) -> None:
    options = {"max_running_requests": 1, "max_total_tokens": 1024}
    prompts = [text(60, seed=60 + index) for index in range(4)]
    cached = {}
    for share in (0.05, 1.0):
        llm = make_llm(**options, swa_full_tokens_ratio=share)
        for prompt in prompts:
            ask(llm, [prompt], None, max_new_tokens=1)
        for prompt in prompts:
            (result,) = ask(llm, [prompt], None, max_new_tokens=NUM_OUTPUTS)
            check(result, prompt, reference)
        cached[share] = llm.stats().num_cached_tokens
    assert cached[1.0] == 4 * 56
    assert cached[0.05] < cached[1.0]

    def sizes(**more: Any) -> tuple[int, ...]:
        asked = {"model": str(model_path), "page_size": 4, "chunked_prefill_size": 12}
        return resolve_config(EngineConfig.of(asked | options | more), home=model_path).pool_sizes

    assert min(sizes(swa_full_tokens_ratio=0.5)) == 128
    assert min(sizes(swa_full_tokens_ratio=1.0)) == 256
