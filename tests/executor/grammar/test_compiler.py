from __future__ import annotations

import threading
import time
import traceback

import pytest

from sapwood.base.clock import ManualClock
from sapwood.base.errors import InvalidRequest, Overloaded, SapwoodError
from sapwood.executor.grammar import compiler as compilers
from sapwood.executor.grammar.compiler import NUM_WORKERS, GrammarCompiler
from sapwood.executor.grammar.sandbox import TrialCancelled
from sapwood.schema import grammar as grammars


class Compiled:
    num_bytes = 1000

    def matcher(self):
        raise NotImplementedError


class Backend:
    """Refuses what begins with "bad"."""

    name = "test"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def compile(self, grammar):
        self.calls.append(grammar.text)
        if grammar.text.startswith("bad"):
            raise InvalidRequest("it is bad")
        if grammar.text.startswith("crash"):
            raise RuntimeError("oh")
        return Compiled()


class Trial:
    """Ends when it may, or is cancelled."""

    def __init__(self, may_end: threading.Event, refusal: SapwoodError | None) -> None:
        self._may_end = may_end
        self._refusal = refusal
        self.is_cancelled = False

    def wait(self) -> None:
        until(lambda: self._may_end.is_set() or self.is_cancelled)
        if self.is_cancelled:
            raise TrialCancelled
        if self._refusal is not None:
            raise self._refusal

    def cancel(self) -> None:
        self.is_cancelled = True


class Sandbox:
    """Its trials end when told to; those of grammars that begin with "hang" are refused."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.tried: list[str] = []
        self.trials: list[Trial] = []
        self.is_closed = False

    def begin(self, grammar):
        self.tried.append(grammar.text)
        refusal = InvalidRequest("it hangs") if grammar.text.startswith("hang") else None
        trial = Trial(self.may_end, refusal)
        self.trials.append(trial)
        return trial

    def close(self):
        self.is_closed = True
        self.may_end.set()


@pytest.fixture
def backend():
    return Backend()


@pytest.fixture
def sandbox():
    made = Sandbox()
    yield made
    made.may_end.set()


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def compiler(backend, sandbox, clock):
    return GrammarCompiler(lambda: backend, sandbox, patience_s=5.0, max_bytes=100, clock=clock)


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


def test_one_compilation_for_all_who_need_it(compiler, backend, sandbox):
    one = grammars.regex("a+")
    for _ in range(3):
        compiler.enter(one)
    assert not compiler.is_ready(one)
    sandbox.may_end.set()
    until(lambda: compiler.is_ready(one))
    assert compiler.compiled(one) is compiler.compiled(grammars.regex("a+"))
    for _ in range(3):
        compiler.leave(one)
    compiler.enter(one)
    assert compiler.is_ready(one)
    assert backend.calls == ["a+"]


def test_kinds_are_told_apart(compiler, backend, sandbox):
    sandbox.may_end.set()
    for one in (grammars.regex("a"), grammars.ebnf("a")):
        compiler.enter(one)
        settled(compiler, one)
    assert backend.calls == ["a", "a"]


def test_a_failure_is_kept_too(compiler, backend, sandbox):
    sandbox.may_end.set()
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


def test_too_large(compiler, backend, sandbox):
    one = grammars.regex("ü" * 51)
    compiler.enter(one)
    with pytest.raises(InvalidRequest, match=r"102 bytes.*at most 100.*--grammar-max-bytes"):
        compiler.is_ready(one)
    assert backend.calls == []


def test_what_the_sandbox_refuses_is_not_compiled(compiler, backend, sandbox):
    sandbox.may_end.set()
    one = grammars.regex("hang")
    compiler.enter(one)
    settled(compiler, one)
    with pytest.raises(InvalidRequest, match="it hangs"):
        compiler.is_ready(one)
    assert backend.calls == []


def test_a_grammar_whose_turn_does_not_come_is_refused_for_now(compiler, backend, sandbox, clock):
    slow = [grammars.regex("a" * (i + 1)) for i in range(NUM_WORKERS)]
    for one in slow:
        compiler.enter(one)
    until(lambda: len(sandbox.tried) == NUM_WORKERS)
    late = grammars.regex("b")
    compiler.enter(late)
    clock.advance(6.0)
    sandbox.may_end.set()
    until(lambda: all(compiler.is_ready(one) for one in slow))

    def is_refused():
        try:
            return compiler.is_ready(late)
        except Overloaded:
            return True

    until(is_refused)
    with pytest.raises(Overloaded, match="try again later"):
        compiler.is_ready(late)
    compiler.leave(late)
    compiler.enter(late)
    until(lambda: compiler.is_ready(late))


def test_a_client_that_left_keeps_no_worker(compiler, backend, sandbox):
    slow = [grammars.regex("a" * (i + 1)) for i in range(NUM_WORKERS + 1)]
    for one in slow:
        compiler.enter(one)
    until(lambda: len(sandbox.tried) == NUM_WORKERS)
    for one in slow:
        compiler.leave(one)
    until(lambda: all(trial.is_cancelled for trial in sandbox.trials))
    sandbox.may_end.set()
    other = grammars.regex("b")
    compiler.enter(other)
    until(lambda: compiler.is_ready(other))
    assert set(backend.calls) <= {"b", *(one.text for one in slow[:NUM_WORKERS])}
    assert slow[-1].text not in sandbox.tried, "nobody waits for its turn"
    assert compiler.num_used == 1


def test_a_grammar_that_was_given_up_is_tried_again_for_who_comes_next(compiler, backend, sandbox):
    one = grammars.regex("a")
    compiler.enter(one)
    until(lambda: sandbox.trials)
    compiler.leave(one)
    compiler.enter(one)
    sandbox.may_end.set()
    until(lambda: compiler.is_ready(one))
    assert backend.calls == ["a"]


def test_a_kept_failure_keeps_no_frames(compiler, backend, sandbox):
    sandbox.may_end.set()
    one = grammars.regex("bad")
    compiler.enter(one)
    settled(compiler, one)
    for _ in range(3):
        with pytest.raises(InvalidRequest) as raised:
            compiler.is_ready(one)
        frames = traceback.extract_tb(raised.value.__traceback__)
        assert len(frames) <= 2, "the frames of earlier raises are not among them"


def test_an_abort_between_plan_and_step_finds_no_grammar(compiler, backend, sandbox, monkeypatch):
    monkeypatch.setattr(compilers, "MAX_ENTRIES", 0)
    sandbox.may_end.set()
    one = grammars.regex("a")
    compiler.enter(one)
    settled(compiler, one)
    compiler.leave(one)
    assert compiler.compiled(one) is None


def test_what_is_not_used_is_forgotten_in_order(compiler, backend, sandbox, monkeypatch):
    monkeypatch.setattr(compilers, "MAX_ENTRIES", 3)
    sandbox.may_end.set()
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


def test_the_memory_counts(compiler, backend, sandbox, monkeypatch):
    monkeypatch.setattr(compilers, "MAX_CACHE_BYTES", 2500)
    sandbox.may_end.set()
    for letter in "abcddcba":
        one = grammars.regex(letter)
        compiler.enter(one)
        settled(compiler, one)
        compiler.leave(one)
    assert backend.calls == [*"abcd", "b", "a"], "two fit"


def test_closing_ends_what_runs_and_begins_no_more(compiler, backend, sandbox):
    for number in range(NUM_WORKERS + 1):
        compiler.enter(grammars.Grammar(kind="regex", text=f"a{number}"))
    until(lambda: len(sandbox.tried) == NUM_WORKERS)
    compiler.close()
    assert sandbox.is_closed
    assert len(sandbox.tried) == NUM_WORKERS
    assert "grammar-compiler" not in {thread.name for thread in threading.enumerate()}


def test_closing_does_not_wait_for_ever(compiler, backend, sandbox, monkeypatch):
    monkeypatch.setattr(compilers, "CLOSE_LIMIT_S", 0.02)
    begun, may_end = threading.Event(), threading.Event()

    def compile_slowly(grammar):
        begun.set()
        may_end.wait(10)
        return Compiled()

    backend.compile = compile_slowly
    sandbox.may_end.set()
    compiler.enter(grammars.Grammar(kind="regex", text="a"))
    assert begun.wait(10)
    compiler.close()
    assert not may_end.is_set()
    may_end.set()
