"""Whisper's decoder says what transformers says of a sound, however steps are cut, from the prefix
cache and from the cache of vectors, and beside others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from sapwood import LLM
from tests.app.llms import Make, llms_of
from tests.hearing import Peer, save, told
from tests.seeing import Shown, ask, check, words


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("hearing") / "model")


@pytest.fixture(scope="module")
def peer(model_path: Path) -> Peer:
    return Peer(model_path)


@pytest.fixture(scope="module")
def make(model_path: Path) -> Iterator[Make]:
    with llms_of(model_path, page_size=4, max_running_requests=4, max_total_tokens=512) as made:
        yield made


@pytest.fixture(scope="module")
def llm(make: Make) -> LLM:
    return make(chunked_prefill_size=16)


def prompts() -> list[Shown]:
    return [told(1, words(9, 1)), told(2, words(40, 2)), told(1, words(9, 3)), told(3, [1])]


def test_in_chunks_beside_others_and_from_hits(llm: LLM, peer: Peer) -> None:
    for _ in range(2):
        for outputs, shown in zip(ask(llm, prompts(), max_new_tokens=9), prompts(), strict=True):
            check(outputs, shown, peer)
    assert outputs[-1].num_cached_tokens == 0  # a prompt of one token
    media = llm.stats().media
    assert media is not None
    assert media.num_encoded == 3
    assert media.num_shared >= 5
    assert llm.stats().num_leased_pages == 0


def test_another_sound_is_no_hit(llm: LLM, peer: Peer) -> None:
    for seed in (10, 11):
        shown = told(seed, words(24, 20))
        outputs = ask(llm, [shown])[0]
        check(outputs, shown, peer)
        assert outputs[-1].num_cached_tokens == 0


def test_retracted_while_they_decode(make: Make, peer: Peer) -> None:
    llm = make(chunked_prefill_size=16, max_total_tokens=112, schedule_conservativeness=0.0)
    shown = [told(seed, words(12, seed)) for seed in range(30, 36)]
    for outputs, one in zip(ask(llm, shown, max_new_tokens=30), shown, strict=True):
        check(outputs, one, peer)
    assert llm.stats().num_retractions > 0


def test_guesses_and_overlap(make: Make, peer: Peer) -> None:
    again = words(9, 40)
    shown = told(40, [*again, *again])
    for options in ({"speculative_algorithm": "NGRAM"}, {"overlap_depth": 2}):
        check(ask(make(**options), [shown], max_new_tokens=20)[0], shown, peer)


def refused(llm: LLM, shown: Shown) -> str:
    finish = ask(llm, [shown])[0][-1].finish
    assert finish is not None
    assert finish.kind == "error"
    return finish.message or ""


def test_what_cannot_be_is_refused(llm: LLM) -> None:
    shown = told(1, words(4, 1))
    one = shown.media[0]
    assert "only requests with a sound" in refused(llm, Shown(words(4, 1)))
    assert "one sound at a time" in refused(llm, Shown(words(4, 1), [one, one]))
    assert "vectors for all tokens" in refused(
        llm, Shown(words(4, 1), [replace(one, num_across=3)])
    )
    assert "has no input_features" in refused(llm, Shown(words(4, 1), [replace(one, tensors={})]))
