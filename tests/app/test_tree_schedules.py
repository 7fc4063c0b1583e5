"""With trees of guesses an engine puts out what it puts out without guesses, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sapwood.executor.trees import TreeMover
from sapwood.schema.step import ScheduledTokens
from tests.app.test_schedule_independence import (
    CROWDED,
    DRAFTS,
    GUESSING,
    Asked,
    Draft,
    check,
    expected,
    kernels_here,
)
from tests.tiers import examples


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def repetitive_prompts() -> list[list[int]]:
    """Of three tokens each, so that each token was followed by several others; every second prompt
    begins as the one before."""
    generator = torch.Generator().manual_seed(5)
    found: list[list[int]] = []
    for length in (9, 14, 20, 27, 31, 40):
        alphabet = torch.randint(0, 256, (3,), generator=generator)
        for end in (2, 8):
            places = torch.randint(0, 3, (end,), generator=generator)
            begin = found[-1][:length] if end == 8 else []
            if not begin:
                begin = alphabet[torch.randint(0, 3, (length,), generator=generator)].tolist()
            found.append(begin + alphabet[places].tolist())
    return found


@st.composite
def worlds_with_trees(draw: st.DrawFn) -> tuple[list[Draft], dict[str, Any]]:
    """Few prompts for many requests, so that most texts came before, and went on in several ways;
    few pages, so that some requests are retracted."""
    drafts = draw(st.lists(DRAFTS, min_size=3, max_size=10))
    page_size = draw(st.sampled_from([1, 4, 8, 16]))
    num_tokens = draw(st.integers(96, 220))
    least = draw(st.integers(2, 4))
    return drafts, {
        **GUESSING,
        "kernels": draw(st.sampled_from(kernels_here())),
        "page_size": page_size,
        "max_total_tokens": num_tokens - num_tokens % page_size,
        "chunked_prefill_size": draw(st.sampled_from([3, 7, 32, -1])),
        "max_running_requests": draw(st.integers(1, 6)),
        "schedule_conservativeness": draw(st.sampled_from([0.0, 1.0])),
        "disable_radix_cache": draw(st.sampled_from([False, False, True])),
        "overlap_depth": draw(st.sampled_from([1, 2])),
        "speculative_num_draft_tokens": draw(st.integers(3, 64)),
        "speculative_max_step_tokens": draw(st.sampled_from([8, 64, 256])),
        "speculative_ngram_min_bfs_breadth": least,
        "speculative_ngram_max_bfs_breadth": draw(st.integers(least, 10)),
        "speculative_ngram_match_type": draw(st.sampled_from(["BFS", "PROB"])),
        "speculative_ngram_branch_length": draw(st.integers(1, 31)),
    }


@settings(
    max_examples=examples(150, usual=12),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(worlds_with_trees())
def test_outputs_do_not_depend_on_trees_of_guesses(
    tiny_llama: Path, world: tuple[list[Draft], dict[str, Any]]
) -> None:
    drafts, options = world
    pool = expected(tiny_llama, repetitive_prompts)
    check(tiny_llama, [draft.of(pool) for draft in drafts], options)


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_trees_beside_retractions_aborts_and_prefix_hits(
    tiny_llama: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of what the property is about does happen."""
    if kernels not in kernels_here():
        pytest.skip("this build has no C++ kernels")
    num_trees = num_moved = 0
    move = TreeMover.move

    def counted(
        mover: TreeMover, entries: Sequence[ScheduledTokens], chosen: Sequence[Sequence[int]]
    ) -> dict[int, list[tuple[int, int]]]:
        nonlocal num_trees, num_moved
        found = move(mover, entries, chosen)
        num_trees += sum(len(set(entry.draft_parents)) < len(entry.draft_ids) for entry in entries)
        num_moved += len(found)
        return found

    monkeypatch.setattr(TreeMover, "move", counted)
    pool = expected(tiny_llama, repetitive_prompts)
    requests = [
        Asked(prompt, output, arrives=index, aborted=index + 6 if index % 5 == 4 else None)
        for index, (prompt, output) in enumerate([*pool, *pool, *pool])
    ]
    options = {
        "kernels": kernels,
        **GUESSING,
        **CROWDED,
        "speculative_ngram_min_bfs_breadth": 3,
        "speculative_num_draft_tokens": 16,
        "speculative_max_step_tokens": 256,
    }
    status = check(tiny_llama, requests, options)
    assert num_trees > 10
    assert num_moved > 0, "the right way through a tree was always its first"
    assert status.speculated is not None
    assert status.speculated.num_accepted > 10
    assert status.num_retractions > 0
    assert status.num_aborted > 0
    assert status.num_cached_tokens > 0
