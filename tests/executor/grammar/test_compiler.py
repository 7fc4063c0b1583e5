from __future__ import annotations

import threading
import time
import traceback

import pytest

from sapwood.base.clock import ManualClock
from sapwood.base.errors import InvalidRequest, Overloaded
from sapwood.executor.grammar import compiler as compilers
from sapwood.executor.grammar.compiler import MAX_ABANDONED, NUM_WORKERS, GrammarCompiler
from sapwood.schema import grammar as grammars


class Compiled:
    num_bytes = 1000

    def matcher(self):
        raise NotImplementedError


class SlowBackend:
    """Compiles when told to; refuses what begins with "bad"."""

    name = "slow"

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.calls: list[str] = []

    def compile(self, grammar):
        self.calls.append(grammar.text)
        if not self.may_end.wait(10):
            raise TimeoutError
        if grammar.text.startswith("bad"):
            raise InvalidRequest("it is bad")
        if grammar.text.startswith("crash"):
            raise RuntimeError("oh")
        return Compiled()


@pytest.fixture
def backend():
    made = SlowBackend()
    yield made
    made.may_end.set()


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def compiler(backend, clock):
    return GrammarCompiler(lambda: backend, timeout_s=5.0, max_bytes=100, clock=clock)


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def settled(compiler, grammar):
    def has_settled():
        try:
            return compiler.is_ready(grammar)
        except InvalidRequest:
            return True

    until(has_settled)


def test_one_compilation_for_all_who_need_it(compiler, backend):
    one = grammars.regex("a+")
    for _ in range(3):
        compiler.enter(one)
    assert not compiler.is_ready(one)
    backend.may_end.set()
    until(lambda: compiler.is_ready(one))
    assert compiler.compiled(one) is compiler.compiled(grammars.regex("a+"))
    for _ in range(3):
        compiler.leave(one)
    compiler.enter(one)
    assert compiler.is_ready(one)
    assert backend.calls == ["a+"]


def test_kinds_are_told_apart(compiler, backend):
    backend.may_end.set()
    for one in (grammars.regex("a"), grammars.ebnf("a")):
        compiler.enter(one)
        settled(compiler, one)
    assert backend.calls == ["a", "a"]


def test_a_failure_is_kept_too(compiler, backend):
    backend.may_end.set()
    for text, message in (("bad", "it is bad"), ("crash", "RuntimeError: oh")):
        for _ in range(2):
            one = grammars.regex(text)
            compiler.enter(one)
            settled(compiler, one)
            with pytest.raises(InvalidRequest, match=message):
                compiler.is_ready(one)
            compiler.leave(one)
    assert backend.calls == ["bad", "crash"]
    assert compiler.num_used == 0


def test_too_large(compiler, backend):
    one = grammars.regex("ü" * 51)
    compiler.enter(one)
    with pytest.raises(InvalidRequest, match=r"102 bytes.*at most 100.*--grammar-max-bytes"):
        compiler.is_ready(one)
    assert backend.calls == []


def test_too_slow(compiler, backend, clock):
    one = grammars.regex("a")
    compiler.enter(one)
    until(lambda: backend.calls)
    clock.advance(5.0)
    assert not compiler.is_ready(one)
    clock.advance(0.1)
    with pytest.raises(InvalidRequest, match=r"5 s.*--grammar-compile-timeout"):
        compiler.is_ready(one)
    other = grammars.regex("b")
    compiler.enter(other)
    backend.may_end.set()
    until(lambda: compiler.is_ready(other))
    with pytest.raises(InvalidRequest):
        compiler.is_ready(one)


def test_a_client_that_left_keeps_no_worker_beyond_the_timeout(compiler, backend, clock):
    slow = [grammars.regex("a" * (i + 1)) for i in range(NUM_WORKERS)]
    for one in slow:
        compiler.enter(one)
    until(lambda: len(backend.calls) == NUM_WORKERS)
    for one in slow:
        compiler.leave(one)
    clock.advance(6.0)
    other = grammars.regex("b")
    compiler.enter(other)
    until(lambda: backend.calls[-1] == "b")
    backend.may_end.set()
    until(lambda: compiler.is_ready(other))


def test_a_kept_failure_keeps_no_frames(compiler, backend):
    backend.may_end.set()
    one = grammars.regex("bad")
    compiler.enter(one)
    settled(compiler, one)
    for _ in range(3):
        with pytest.raises(InvalidRequest) as raised:
            compiler.is_ready(one)
        frames = traceback.extract_tb(raised.value.__traceback__)
        assert len(frames) <= 2, "the frames of earlier raises are not among them"


def test_an_abort_between_plan_and_step_finds_no_grammar(compiler, backend, monkeypatch):
    monkeypatch.setattr(compilers, "MAX_ENTRIES", 0)
    backend.may_end.set()
    one = grammars.regex("a")
    compiler.enter(one)
    settled(compiler, one)
    compiler.leave(one)
    assert compiler.compiled(one) is None


def test_slow_ones_cannot_take_all_cores(compiler, backend, clock):
    slow = [grammars.regex("a" * (i + 1)) for i in range(MAX_ABANDONED)]
    for start in range(0, MAX_ABANDONED, NUM_WORKERS):
        pair = slow[start : start + NUM_WORKERS]
        for one in pair:
            compiler.enter(one)
        until(lambda: len(backend.calls) == start + len(pair))  # noqa: B023
        clock.advance(6.0)
        for one in pair:
            with pytest.raises(InvalidRequest):
                compiler.is_ready(one)
    one_more = grammars.regex("b")
    compiler.enter(one_more)
    with pytest.raises(Overloaded):
        compiler.is_ready(one_more)
    compiler.leave(one_more)
    backend.may_end.set()

    def works_again():
        compiler.enter(one_more)
        try:
            return compiler.is_ready(one_more)
        except Overloaded:
            return False
        finally:
            compiler.leave(one_more)

    until(works_again)


def test_what_is_not_used_is_forgotten_in_order(compiler, backend, monkeypatch):
    monkeypatch.setattr(compilers, "MAX_ENTRIES", 3)
    backend.may_end.set()
    made = [grammars.regex(letter) for letter in "abcde"]
    for one in made:
        compiler.enter(one)
        settled(compiler, one)
    assert all(compiler.is_ready(grammar) for grammar in made), "all are in use"
    for one in made:
        compiler.leave(one)
    for one in reversed(made):
        compiler.enter(one)
        settled(compiler, one)
    assert backend.calls == [*"abcde", "b", "a"]


def test_the_memory_counts(compiler, backend, monkeypatch):
    monkeypatch.setattr(compilers, "MAX_CACHE_BYTES", 2500)
    backend.may_end.set()
    for letter in "abcddcba":
        one = grammars.regex(letter)
        compiler.enter(one)
        settled(compiler, one)
        compiler.leave(one)
    assert backend.calls == [*"abcd", "b", "a"], "two fit"


def test_closing_waits_for_what_runs_and_begins_no_more(compiler, backend):
    for number in range(NUM_WORKERS + 1):
        compiler.enter(grammars.Grammar(kind="regex", text=f"a{number}"))
    until(lambda: len(backend.calls) == NUM_WORKERS)
    closing = threading.Thread(target=compiler.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    backend.may_end.set()
    closing.join(10)
    assert not closing.is_alive()
    assert len(backend.calls) == NUM_WORKERS
    assert "grammar-compiler" not in {thread.name for thread in threading.enumerate()}


def test_closing_does_not_wait_for_ever(compiler, backend, monkeypatch):
    monkeypatch.setattr(compilers, "CLOSE_LIMIT_S", 0.02)
    compiler.enter(grammars.Grammar(kind="regex", text="a"))
    until(lambda: backend.calls)
    compiler.close()
