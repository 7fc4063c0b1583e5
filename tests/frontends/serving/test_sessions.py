"""Sessions: prompts are what a client would have written out, and a server's memory is bounded."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.base.errors import InvalidRequest, Overloaded
from sapwood.frontends.serving import sessions as module
from sapwood.frontends.serving.sessions import SessionParams, Sessions, Turn

BOS = 1


@dataclass
class Clock:
    s: float = 0.0

    def now_s(self) -> float:
        return self.s


def begin(sessions: Sessions, session: str, rid: str, ids: list[int], **params: Any) -> Turn:
    turn, _ = sessions.begin(SessionParams(session_id=session, **params), rid, ids, bos=BOS)
    return turn


def answer(turn: Turn, ids: list[int]) -> None:
    turn.begun()
    turn.heard(ids, is_last=True)
    turn.ended()


@given(seed=st.integers(0, 2**32))
def test_prompts_are_those_of_a_client_that_writes_them_out(seed: int) -> None:
    """Branches, offsets, replaced turns; what is counted is what is kept."""
    draw = random.Random(seed)
    sessions = Sessions(Clock())
    name = sessions.open()
    whole: dict[str, tuple[list[int], list[int]]] = {}
    parents: dict[str, str | None] = {}
    for number in range(12):
        rid = draw.choice([None, *whole])
        offset, new = draw.randint(-6, 6), [draw.randint(1, 9) for _ in range(draw.randint(1, 4))]
        drops, replaces = draw.random() < 0.3, draw.random() < 0.3
        if replaces:
            gone = {one for one in whole if rid is None or rid in ancestors(one, parents)}
            for one in gone:
                del whole[one]
        expected = list(new)
        if rid is not None:
            prompt, output = whole[rid]
            kept = prompt + ([] if drops else output)
            kept = kept[:offset] if offset else kept
            expected = kept + (new[1:] if new[0] == BOS else new)
        turn = begin(
            sessions, name, f"r{number}", new, request_id=rid, offset=offset,
            drops_output=drops, replaces=replaces,
        )  # fmt: skip
        assert turn.prompt_ids() == expected
        output = [draw.randint(1, 9) for _ in range(draw.randint(1, 4))]
        answer(turn, output)
        whole[f"r{number}"], parents[f"r{number}"] = (expected, output), rid
    kept_turns = sessions._open[name].turns
    assert set(kept_turns) == set(whole)
    assert sessions.num_ids == sum(
        module.TURN_IDS + len(one.new_ids) + len(one.output_ids) for one in kept_turns.values()
    )
    sessions.close(name)
    assert sessions.num_ids == 0


def fill(sessions: Sessions, session: str) -> None:
    for number in range(20):
        answer(begin(sessions, session, f"{number}", [5]), [6])


def ancestors(rid: str, parents: dict[str, str | None]) -> set[str]:
    found: set[str] = set()
    parent = parents[rid]
    while parent is not None:
        found.add(parent)
        parent = parents[parent]
    return found


def test_a_turn_that_runs_can_only_be_replaced() -> None:
    sessions = Sessions(Clock())
    name = sessions.open()
    first = begin(sessions, name, "a", [5, 6])
    first.begun()
    first.heard([7, 8], is_last=False)
    with pytest.raises(InvalidRequest, match="has not finished"):
        begin(sessions, name, "b", [9], request_id="a")
    params = SessionParams(session_id=name, request_id="a", replaces=True)
    turn, stopped = sessions.begin(params, "b", [9], bos=BOS)
    assert stopped == [first]
    first.heard([9, 9], is_last=True)
    assert turn.prompt_ids() == [5, 6, 7, 8, 9]


def test_a_refused_request_is_no_turn() -> None:
    sessions = Sessions(Clock())
    name = sessions.open()
    turn = begin(sessions, name, "a", [5])
    turn.begun()
    turn.ended()
    with pytest.raises(InvalidRequest, match="no request 'a'"):
        begin(sessions, name, "b", [9], request_id="a")
    assert sessions.num_ids == 0


def test_ids_of_sessions_are_the_clients_or_new() -> None:
    sessions = Sessions(Clock())
    assert sessions.open("mine") == "mine"
    assert sessions.open() != sessions.open()
    for wrong in ("mine", "", "x" * 300):
        with pytest.raises(InvalidRequest, match="session"):
            sessions.open(wrong)
    sessions.close("mine")
    assert sessions.open("mine") == "mine"
    with pytest.raises(InvalidRequest, match="does not exist"):
        begin(sessions, "other", "a", [5])


def test_a_million_sessions_and_histories_without_end_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    sessions = Sessions(clock)
    for _ in range(module.MAX_SESSIONS):
        sessions.open()
    with pytest.raises(Overloaded, match="4096 sessions are open"):
        sessions.open()
    clock.s = module.MAX_IDLE_S + 1
    name, other = sessions.open(), sessions.open()
    assert len(sessions) == 2
    monkeypatch.setattr(module, "MAX_SESSION_IDS", 1500)
    monkeypatch.setattr(module, "MAX_IDS", 2000)
    with pytest.raises(InvalidRequest, match="open another"):
        fill(sessions, name)
    with pytest.raises(Overloaded, match="close those"):
        fill(sessions, other)
    assert sessions.num_ids <= 2000
    clock.s *= 3
    sessions.open()
    assert len(sessions) == 1
    assert sessions.num_ids == 0


def test_a_session_whose_request_runs_is_not_idle() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    name = sessions.open()
    turn = begin(sessions, name, "a", [5])
    turn.begun()
    clock.s = 2 * module.MAX_IDLE_S
    sessions.open()
    turn.heard([6], is_last=True)
    turn.ended()
    assert begin(sessions, name, "b", [7], request_id="a").prompt_ids() == [5, 6, 7]
