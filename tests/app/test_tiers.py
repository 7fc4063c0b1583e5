"""A host tier behind a small KV pool: prefixes come back, and outputs are those without a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sapwood import LLM
from sapwood.app.building import runners, tiers
from sapwood.executor.page_copies import ArrivingCaches
from sapwood.kernels.cpu.native import CpuKernels
from tests.app.llms import llms_of
from tests.app.test_logprobs import ask
from tests.app.test_windows import MODELS as WINDOWED
from tests.app.test_windows import save, text
from tests.models.lm.cases import peer_of
from tests.tiny import VOCAB, save_lfm2, save_llama, save_qwen3_5, write_tokenizer


def save_peer(path: Path, case: str) -> Path:
    peer_of(case, vocab_size=VOCAB).model.save_pretrained(path)
    write_tokenizer(path)
    return path


SMALL = {
    "page_size": 4,
    "max_total_tokens": 144,
    "max_running_requests": 1,
    "chunked_prefill_size": 16,
}
"""A pool for one of the prompts and its output."""
NUM_OUTPUTS = 12
MODELS: dict[str, Callable[[Path], Path]] = {
    "pages": save_llama,
    "windows and pages": lambda path: save(path, **WINDOWED["layers take turns"]),
    "windows": lambda path: save(path, **WINDOWED["every layer has a window"]),
    "states and pages": save_lfm2,
    "matrices and pages": save_qwen3_5,
    "latent rows": lambda path: save_peer(path, "deepseek_v2"),
}
CASES = [
    ("pages", "write_through", "auto"),
    ("pages", "write_back", "fp8_e4m3"),
    ("windows and pages", "write_back", "auto"),
    ("windows", "write_through", "auto"),
    ("states and pages", "write_back", "auto"),
    ("matrices and pages", "write_through", "auto"),
    ("pages", "write_through_selective", "auto"),
]


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    known: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in known:
            known[name] = MODELS[name](tmp_path_factory.mktemp("tiers"))
        return known[name]

    return of


@pytest.fixture
def make_llm() -> Iterator[Callable[..., LLM]]:
    with llms_of(Path(), **SMALL) as make:
        yield make


def outputs_of(llm: LLM, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    results = [ask(llm, [prompt], None, max_new_tokens=NUM_OUTPUTS)[0] for prompt in prompts]
    return [(one.token_ids, one.logprobs.of_tokens()) for one in results]


@pytest.mark.parametrize(("name", "policy", "kv_dtype"), CASES)
def test_outputs_are_those_without_a_cache(
    make_llm: Callable[..., LLM],
    path_of: Callable[[str], Path],
    name: str,
    policy: str,
    kv_dtype: str,
) -> None:
    prompts = [text(90 + index, seed=index) for index in range(4)]
    common: dict[str, Any] = {"model": path_of(name), "kv_cache_dtype": kv_dtype}
    plain = make_llm(**common, disable_radix_cache=True)
    expected = outputs_of(plain, prompts)
    tiered = make_llm(
        **common,
        enable_hierarchical_cache=True,
        hicache_ratio=20.0 if name == "windows" else 6.0,
        hicache_write_policy=policy,
        swa_full_tokens_ratio=1.0 if "windows and" in name else None,
    )
    turns = 3 if policy == "write_through_selective" else 2
    if turns == 3:  # the second use of each is what selects it
        prompts = [prompt for prompt in prompts for _ in range(2)]
        expected = [one for one in expected for _ in range(2)]
    for turn in range(turns):
        before = tiered.stats().num_cached_tokens
        assert outputs_of(tiered, prompts) == expected
        if turn:
            cached = tiered.stats().num_cached_tokens - before
            assert cached >= 80 * len(prompts), "each prompt came back from the host"
    assert tiered.stats().num_leased_pages == 0


def test_each_rank_has_copies_of_its_own_part(
    make_llm: Callable[..., LLM], path_of: Callable[[str], Path]
) -> None:
    prompts = [text(90 + index, seed=index) for index in range(2)]
    llm = make_llm(
        model=path_of("pages"), tp_size=2, enable_hierarchical_cache=True, hicache_ratio=6.0
    )
    computed = outputs_of(llm, prompts)
    assert llm.stats().num_cached_tokens == 0
    assert outputs_of(llm, prompts) == computed
    assert llm.stats().num_cached_tokens >= 80 * len(prompts), "they came back from the host"
    assert llm.stats().num_leased_pages == 0


class LateQueue:
    """A CopyQueue whose copies are made when somebody waits for them."""

    def __init__(self, carry_rows: Callable[..., None]) -> None:
        self.waits = 0
        self._carry_rows = carry_rows
        self._late: list[Callable[[], None]] | None = None

    def carry_rows(self, *rows: Any) -> None:
        if self._late is None:
            self._carry_rows(*rows)
        else:
            self._late.append(partial(self._carry_rows, *rows))

    def follow(self) -> None:
        pass

    @contextmanager
    def used(self) -> Iterator[None]:
        self._late = []
        yield
        self._late = None

    def mark(self) -> Callable[[], None]:
        assert self._late is not None
        queued = list(self._late)
        self._late.clear()

        def wait() -> None:
            self.waits += 1
            for copy in queued:
                copy()

        return wait

    def stopwatch(self) -> Callable[[], Callable[[], float | None]]:
        return lambda: lambda: 1e-6


@pytest.mark.parametrize("chunk", [16, 1])
@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [
        ("pages", "fp8_e4m3"),
        ("windows and pages", "auto"),
        ("matrices and pages", "auto"),
        ("latent rows", "auto"),
    ],
)
def test_layers_wait_for_their_own_part_of_what_comes_back(
    make_llm: Callable[..., LLM],
    path_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kv_dtype: str,
    chunk: int,
) -> None:
    """As on a device with queues, whose copies are not there before somebody waits for them."""
    queues: list[LateQueue] = []
    carry_at_once = CpuKernels.carry_rows

    def beside(device: Any, arriving: Any) -> tuple[LateQueue, ArrivingCaches]:
        queues.append(LateQueue(carry_at_once))
        return queues[-1], arriving

    def carry_rows(self: CpuKernels, *rows: Any) -> None:
        queues[-1].carry_rows(self, *rows)

    common: dict[str, Any] = {
        "model": path_of(name),
        "kv_cache_dtype": kv_dtype,
        "disable_graphs": True,
        "chunked_prefill_size": chunk,
        "swa_full_tokens_ratio": 1.0 if "windows" in name else None,
    }
    # With chunks of one token all steps look like those that a device captures whole.
    prompts = [text(90 + index, seed=index) for index in range(3)]
    expected = outputs_of(make_llm(**common, disable_radix_cache=True), prompts)
    monkeypatch.setattr(tiers, "copied_beside", beside)
    monkeypatch.setattr(runners, "awaited", lambda device, caches: ArrivingCaches(caches))
    monkeypatch.setattr(CpuKernels, "carry_rows", carry_rows)
    tiered = make_llm(**common, enable_hierarchical_cache=True, hicache_ratio=6.0)
    for _ in range(2):
        assert outputs_of(tiered, prompts) == expected
    assert tiered.stats().num_cached_tokens >= 80 * len(prompts)
    assert queues[0].waits, "copies were awaited"
    assert tiered.stats().num_leased_pages == 0
