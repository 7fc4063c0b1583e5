"""Models that see: an engine says what transformers says of pictures, however steps are cut, from
the prefix cache and from the cache of vectors, and beside others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sapwood import LLM
from sapwood.schema.request import OrderWeights
from sapwood.schema.weights import ReleaseMemory
from tests.app.llms import Make, llms_of
from tests.seeing import FAMILIES, Peer, Seeing, Shown, ask, check, save, save_rewritten, words
from tests.seeing_families import MORE

THOROUGH = (
    "test_updates_of_weights_are_refused_by_their_reason",
    "test_another_picture_in_the_same_place_is_no_hit",
    "test_retracted_while_they_decode",
    "test_guesses_of_what_a_text_said_before",
)
"""Tests of how the engine treats pictures, which is the same for towers of one kind."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        thorough = [*FAMILIES, "Gemma 3"]
        names = thorough if metafunc.function.__name__ in THOROUGH else [*FAMILIES, *MORE]
        metafunc.parametrize("family", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> Seeing:
    return (FAMILIES | MORE)[request.param]


@pytest.fixture(scope="module")
def model_path(family: Seeing, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("seeing") / "model", family)


@pytest.fixture(scope="module")
def peer(model_path: Path, family: Seeing) -> Peer:
    return Peer(model_path, family)


@pytest.fixture(scope="module")
def make(
    model_path: Path, family: Seeing, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Make]:
    own = save_rewritten(model_path, tmp_path_factory.mktemp("own") / "model", family)
    with llms_of(own, page_size=4, max_running_requests=4, max_total_tokens=2048) as made:
        yield made


@pytest.fixture(scope="module")
def llm(make: Make) -> LLM:
    return make(chunked_prefill_size=16)


def prompts_of(family: Seeing) -> list[Shown]:
    one, two, three = (family.picture(seed, size) for seed, size in enumerate(family.sizes))
    found = [
        Shown.of(family, words(7, 1), one, words(9, 2)),
        Shown.of(family, words(3, 3), two, words(2, 4), three, words(30, 5)),
        Shown.of(family, words(1, 10), one, words(1, 11), one, words(5, 6)),
        Shown(words(21, 7)),
    ]
    found += [
        Shown.of(family, words(5, 8), family.picture(9, size), words(4, 9))
        for size in family.video_sizes
    ]
    return found


def test_at_once(make: Make, family: Seeing, peer: Peer) -> None:
    llm = make()
    for shown in prompts_of(family):
        check(ask(llm, [shown])[0], shown, peer)


def test_in_chunks_beside_others_and_from_hits(llm: LLM, family: Seeing, peer: Peer) -> None:
    prompts = prompts_of(family)
    for _ in range(2):
        for outputs, shown in zip(ask(llm, prompts), prompts, strict=True):
            check(outputs, shown, peer)
    # The second round ends in all but the last tokens of a prompt that the first has left.
    outputs = ask(llm, prompts[:1])[0]
    assert outputs[-1].num_cached_tokens > len(prompts[0].token_ids) - 8
    stats = llm.stats()
    assert stats.num_leased_pages == 0
    assert stats.media is not None
    # One picture is in two prompts, and all were there in the second round.
    assert stats.media.num_encoded == len({one.digest for shown in prompts for one in shown.media})
    assert stats.media.num_shared > 0
    assert 0 < stats.media.num_bytes <= stats.media.max_bytes
    assert stats.media.encoding_s > 0


def test_another_picture_in_the_same_place_is_no_hit(llm: LLM, family: Seeing, peer: Peer) -> None:
    size = family.sizes[0]
    ask(llm, [Shown.of(family, words(12, 20), family.picture(50, size), words(8, 21))])
    other = Shown.of(family, words(12, 20), family.picture(51, size), words(8, 21))
    outputs = ask(llm, [other])[0]
    check(outputs, other, peer)
    # Models with states go on where a state was kept, which is not there.
    assert outputs[-1].num_cached_tokens == (0 if "linear_num_key_heads" in family.text else 12)
    longer = Shown.of(family, words(12, 20), family.picture(51, size), words(8, 21), words(3, 22))
    outputs = ask(llm, [longer])[0]
    check(outputs, longer, peer)
    assert outputs[-1].num_cached_tokens >= len(other.token_ids) - 4


def test_retracted_while_they_decode(make: Make, family: Seeing, peer: Peer) -> None:
    llm = make(chunked_prefill_size=16, max_total_tokens=160, schedule_conservativeness=0.0)
    prompts = [
        Shown.of(family, words(4, seed), family.picture(seed, family.sizes[0]), words(11, seed))
        for seed in range(30, 36)
    ]
    for outputs, shown in zip(ask(llm, prompts, max_new_tokens=40), prompts, strict=True):
        check(outputs, shown, peer)
    assert llm.stats().num_retractions > 0


def test_guesses_of_what_a_text_said_before(make: Make, family: Seeing, peer: Peer) -> None:
    llm = make(speculative_algorithm="NGRAM", chunked_prefill_size=16)
    again = words(12, 40)
    shown = Shown.of(family, again, family.picture(40, family.sizes[1]), again, again)
    check(ask(llm, [shown], max_new_tokens=30)[0], shown, peer)


def refused(llm: LLM, shown: Shown) -> str:
    finish = ask(llm, [shown])[0][-1].finish
    assert finish is not None
    assert finish.kind == "error"
    return finish.message or ""


def test_what_cannot_be_is_refused(llm: LLM, make: Make, family: Seeing) -> None:
    shown = Shown.of(family, words(4, 1), family.picture(1, family.sizes[0]), words(2, 2))
    one = shown.media[0]

    def changed(**fields: Any) -> Shown:
        return Shown(shown.token_ids, [replace(one, **fields)])

    (start, length), *_ = one.spans
    assert "stands for" in refused(llm, changed(spans=((start, length - 1),)))
    assert "ends after the prompt" in refused(llm, changed(spans=((start + 10, length),)))
    assert "has no pixel_values" in refused(llm, changed(tensors={}))
    assert "digest" in refused(llm, changed(digest=b"short"))
    blind = make(language_only=True)
    assert "takes only text" in refused(blind, shown)


def test_updates_of_weights_are_refused_by_their_reason(llm: LLM) -> None:
    order = OrderWeights(call_id="w", order=ReleaseMemory(tags=[]), flush_cache=False)
    done = llm.run(llm._client.order_weights(order))
    assert not done.done
    assert "--language-only" in done.message
