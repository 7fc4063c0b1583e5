"""Vectors of media have the users that hold them, and never take more bytes than they may."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from sapwood.engine.media import REST_STEPS, MediaVectors
from sapwood.engine.request_state import RequestState
from sapwood.schema.media import Medium
from sapwood.schema.request import Generate, RequestOptions

BYTES = 2
MOST = 40 * BYTES
BUDGET = 25


class Facts:
    def __init__(self, *, attends_both_ways: bool = False) -> None:
        self.attends_both_ways = attends_both_ways

    def why_unfit(self, medium: Medium) -> str | None:
        return "it is no image" if medium.kind != "image" else None

    def num_patches(self, medium: Medium) -> int:
        return medium.num_tokens


def medium(name: int, start: int, length: int) -> Medium:
    digest = hashlib.sha256(f"{name} {length}".encode()).digest()
    return Medium(kind="image", digest=digest, tensors={}, spans=((start, length),))


def state(name: str, media: list[Medium]) -> RequestState:
    end = max((start + length for one in media for start, length in one.spans), default=0)
    request = Generate(
        request_id=name, prompt_ids=[1] * (end + 2), media=media, options=RequestOptions()
    )
    return RequestState(request, max_new_tokens=1, seed=0, arrival=0, arrival_s=0.0)


def account(*, attends_both_ways: bool = False) -> MediaVectors:
    facts = Facts(attends_both_ways=attends_both_ways)
    return MediaVectors(facts, vector_bytes=BYTES, max_bytes=MOST, patches_per_step=BUDGET)


def pictures(sizes: list[tuple[int, int]]) -> list[Medium]:
    """One after another, with a token between."""
    found, at = [], 1
    for name, length in sizes:
        found.append(medium(name, at, length))
        at += length + 1
    return found


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 60), st.booleans()), max_size=60),
    st.booleans(),
)
def test_any_schedule(
    prompts: list[list[tuple[int, int]]], turns: list[tuple[int, int, bool]], both_ways: bool
) -> None:
    """A rank that does as it is told has each vector that a granted token needs, and computes a
    picture in one step where its tokens see one another."""
    vectors = account(attends_both_ways=both_ways)
    states = [state(f"r{index}", pictures(sizes)) for index, sizes in enumerate(prompts)]
    done = [0] * len(states)
    there: set[bytes] = set()
    for who, count, leaves in turns:
        index = who % len(states)
        one = states[index]
        vectors.begin_step()
        if leaves:
            vectors.leave(one)
            done[index] = 0
            continue
        start = done[index]
        num_new = min(count, len(one.prompt_ids) - start)
        granted = vectors.grant(one, start, num_new)
        assert 0 <= granted <= (len(one.prompt_ids) - start if both_ways else num_new)
        for shown in one.media if both_ways else ():
            ((first, length),) = shown.spans
            assert not first < start + granted < first + length, "a picture is cut"
        encodes, forgets = vectors.take_orders()
        assert there.issuperset(forgets), "what was never made is forgotten"
        there -= set(forgets)
        assert there.isdisjoint(made.digest for made in encodes), "made twice"
        there |= {made.digest for made in encodes}
        patches = sum(made.num_tokens for made in encodes)
        assert patches <= BUDGET or len(encodes) == 1
        for shown in one.media:
            ((first, length),) = shown.spans
            if first < start + granted and first + length > start:
                assert shown.digest in there, "a token is computed without its vector"
        vectors.check()
        done[index] = start + granted
        vectors.computed(one, done[index])
        vectors.check()
    for one in states:
        vectors.leave(one)
    vectors.check()
    assert vectors.num_held == 0


def test_requests_share_what_is_encoded_once() -> None:
    vectors = account()
    first, second = (state(name, [medium(1, 2, 10)]) for name in "ab")
    vectors.begin_step()
    assert vectors.grant(first, 0, 14) == 14
    assert vectors.grant(second, 0, 14) == 14
    assert len(vectors.take_orders()[0]) == 1
    assert (vectors.num_encoded, vectors.num_shared) == (1, 1)


def test_a_chunk_ends_before_what_a_step_cannot_encode() -> None:
    vectors = account()
    one = state("a", pictures([(1, 20), (2, 15)]))
    vectors.begin_step()
    assert vectors.grant(one, 0, 39) == 22, "1 + 20 + 1 tokens: the second has too many patches"
    vectors.computed(one, 22)
    vectors.begin_step()
    assert vectors.grant(one, 22, 17) == 17


def test_a_medium_waits_until_others_leave() -> None:
    vectors = account()
    first, second = state("a", [medium(1, 0, 25)]), state("b", [medium(2, 3, 25)])
    vectors.begin_step()
    assert vectors.grant(first, 0, 5) == 5
    vectors.computed(first, 5)
    vectors.begin_step()
    assert vectors.grant(second, 0, 30) == 3, "its bytes are not free"
    vectors.leave(first)
    vectors.begin_step()
    assert vectors.grant(second, 3, 27) == 27
    encodes, forgets = vectors.take_orders()
    assert forgets == []
    assert [made.digest for made in encodes] == [second.media[0].digest]


def refusal(media: list[Medium], num_tokens: int = 100) -> str:
    request = Generate(
        request_id="a", prompt_ids=[1] * num_tokens, media=media, options=RequestOptions()
    )
    return account().why_refused(request) or ""


def test_refusals_say_why() -> None:
    assert refusal([medium(1, 0, 10)]) == ""
    assert "--vlm-cache-size-mb" in refusal([medium(1, 0, 41)])
    assert "follow one another" in refusal([medium(1, 5, 10), medium(2, 14, 3)])
    assert "after the prompt" in refusal([medium(1, 95, 10)])
    short = Medium(kind="image", digest=b"x", tensors={}, spans=((0, 1),))
    assert "32 bytes" in refusal([short])
    video = Medium(kind="video", digest=bytes(32), tensors={}, spans=((0, 1),))
    assert refusal([video]) == "it is no image"


def test_steps_rest_from_encoding_while_others_decode() -> None:
    vectors = account()
    one = state("a", pictures([(1, 20), (2, 15)]))

    def granted(start: int, *, others_decode: bool) -> int:
        vectors.begin_step(others_decode=others_decode)
        found = vectors.grant(one, start, 39 - start)
        vectors.computed(one, start + found)
        return found

    assert granted(0, others_decode=True) == 22
    assert [granted(22, others_decode=True) for _ in range(REST_STEPS)] == [0] * REST_STEPS
    assert granted(22, others_decode=True) == 17
    other = state("b", [medium(7, 0, 10)])
    vectors.begin_step(others_decode=False)
    assert vectors.grant(other, 0, 12) == 12, "nobody waits for a token"


def test_beside_decodes_pictures_are_encoded_as_far_as_the_time_goes() -> None:
    vectors = MediaVectors(
        Facts(), vector_bytes=BYTES, max_bytes=1000, patches_per_step=100, target_s=0.25
    )
    one = state("r", pictures([(name, 10) for name in range(9)]))
    end = len(one.prompt_ids)

    def encoded_by(*, others_decode: bool) -> int:
        vectors.begin_step(others_decode=others_decode)
        vectors.grant(one, 0, end)
        media, _ = vectors.take_orders()
        vectors.encoded(media, 0.01 * 10 * len(media))
        return len(media)

    def rest() -> None:
        for _ in range(REST_STEPS):
            assert encoded_by(others_decode=True) == 0

    # Nothing was measured: one alone. Then a picture takes 0.1 s, of 0.25 that there are.
    assert encoded_by(others_decode=True) == 1
    rest()
    assert encoded_by(others_decode=True) == 2
    rest()
    # Alone, as many as a step takes.
    assert encoded_by(others_decode=False) == 6
