from __future__ import annotations

import threading
import time

import pytest

from sapwood.base.clock import ManualClock
from sapwood.base.errors import InvalidRequest, SapwoodError
from sapwood.executor.grammar import compiler as compilers
from sapwood.executor.grammar.compiler import NUM_WORKERS, GrammarCompiler, Way
from sapwood.executor.grammar.interface import GrammarFailed
from sapwood.executor.grammar.sandbox import BackendRefused, TrialCancelled
from sapwood.schema import grammar as grammars
from sapwood.schema.output import Finish
from sapwood.schema.rank import CompileGrammar, GrammarAnswer, ReleaseGrammar


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

    def prepare(self):
        raise NotImplementedError

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


class Scheduler:
    """Orders and releases grammars, each as often as told, and has the rank's answers."""

    def __init__(self, backend, sandbox, clock) -> None:
        self.answers: dict[int, GrammarAnswer] = {}
        self.compiler = GrammarCompiler(
            [Way(lambda: backend, sandbox)],
            self._hear,
            rank=3,
            patience_s=5.0,
            max_bytes=100,
            clock=clock,
        )
        self._orders: dict[tuple[str, str], list[int]] = {}
        self._num_orders = 0

    def _hear(self, answer: GrammarAnswer) -> None:
        assert answer.rank == 3
        assert answer.id not in self.answers, "an order is answered once"
        self.answers[answer.id] = answer

    def order(self, grammar) -> int:
        self._num_orders += 1
        self._orders.setdefault(grammar.key, []).append(self._num_orders)
        self.compiler.take(CompileGrammar(id=self._num_orders, grammar=grammar))
        return self._num_orders

    def release(self, grammar) -> None:
        self.compiler.take(ReleaseGrammar(id=self._orders[grammar.key].pop()))

    def refusal(self, grammar) -> Finish | None:
        """Waits for the answer to the last order of that grammar."""
        order = self._orders[grammar.key][-1]
        until(lambda: order in self.answers)
        return self.answers[order].refusal


@pytest.fixture
def scheduler(backend, sandbox, clock):
    return Scheduler(backend, sandbox, clock)


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_one_compilation_for_all_who_need_it(scheduler, backend, sandbox):
    one = grammars.regex("a+")
    orders = [scheduler.order(one) for _ in range(3)]
    assert scheduler.answers == {}
    sandbox.may_end.set()
    until(lambda: set(orders) == scheduler.answers.keys())
    assert all(answer.refusal is None for answer in scheduler.answers.values())
    compiler = scheduler.compiler
    assert compiler.compiled(one) is compiler.compiled(grammars.regex("a+"))
    for _ in range(3):
        scheduler.release(one)
    assert scheduler.order(one) in scheduler.answers, "answered at once"
    assert backend.calls == ["a+"]


def test_kinds_are_told_apart(scheduler, backend, sandbox):
    sandbox.may_end.set()
    for one in (grammars.regex("a"), grammars.ebnf("a")):
        scheduler.order(one)
        assert scheduler.refusal(one) is None
    assert backend.calls == ["a", "a"]


def test_a_failure_is_kept_too(scheduler, backend, sandbox):
    sandbox.may_end.set()
    for text, message in (("bad", "it is bad"), ("crash", "RuntimeError: oh")):
        for _ in range(2):
            one = grammars.regex(text)
            scheduler.order(one)
            refusal = scheduler.refusal(one)
            assert refusal is not None
            assert message in refusal.message
            assert (refusal.kind, refusal.status) == ("error", 400)
            scheduler.release(one)
    assert backend.calls == ["bad", "crash"]
    assert scheduler.compiler.num_used == 0


def test_too_large(scheduler, backend, sandbox):
    one = grammars.regex("ü" * 51)
    scheduler.order(one)
    refusal = scheduler.refusal(one)
    assert refusal is not None
    assert "102 bytes but this server compiles at most 100" in refusal.message
    assert "--grammar-max-bytes" in refusal.message
    assert backend.calls == []


def test_what_the_sandbox_refuses_is_not_compiled(scheduler, backend, sandbox):
    sandbox.may_end.set()
    one = grammars.regex("hang")
    scheduler.order(one)
    refusal = scheduler.refusal(one)
    assert refusal is not None
    assert refusal.message == "it hangs"
    assert backend.calls == []


def test_a_grammar_whose_turn_does_not_come_is_refused_for_now(scheduler, backend, sandbox, clock):
    slow = [grammars.regex("a" * (i + 1)) for i in range(NUM_WORKERS)]
    for one in slow:
        scheduler.order(one)
    until(lambda: len(sandbox.tried) == NUM_WORKERS)
    late = grammars.regex("b")
    scheduler.order(late)
    clock.advance(6.0)
    sandbox.may_end.set()
    assert [scheduler.refusal(one) for one in slow] == [None] * NUM_WORKERS
    refusal = scheduler.refusal(late)
    assert refusal is not None
    assert refusal.status == 503
    assert "try again later" in refusal.message
    scheduler.release(late)
    scheduler.order(late)
    assert scheduler.refusal(late) is None


def test_a_client_that_left_keeps_no_worker(scheduler, backend, sandbox):
    slow = [grammars.regex("a" * (i + 1)) for i in range(NUM_WORKERS + 1)]
    for one in slow:
        scheduler.order(one)
    until(lambda: len(sandbox.tried) == NUM_WORKERS)
    for one in slow:
        scheduler.release(one)
    until(lambda: all(trial.is_cancelled for trial in sandbox.trials))
    sandbox.may_end.set()
    other = grammars.regex("b")
    scheduler.order(other)
    assert scheduler.refusal(other) is None
    assert set(backend.calls) <= {"b", *(one.text for one in slow[:NUM_WORKERS])}
    assert slow[-1].text not in sandbox.tried, "nobody waits for its turn"
    assert scheduler.compiler.num_used == 1
    assert len(scheduler.answers) == 1, "released orders are not answered"


def test_a_grammar_that_was_given_up_is_tried_again_for_who_comes_next(scheduler, backend, sandbox):
    one = grammars.regex("a")
    scheduler.order(one)
    until(lambda: sandbox.trials)
    scheduler.release(one)
    scheduler.order(one)
    sandbox.may_end.set()
    assert scheduler.refusal(one) is None
    assert backend.calls == ["a"]


def test_an_abort_between_plan_and_step_finds_no_grammar(scheduler, backend, sandbox, monkeypatch):
    monkeypatch.setattr(compilers, "MAX_ENTRIES", 0)
    sandbox.may_end.set()
    one = grammars.regex("a")
    scheduler.order(one)
    assert scheduler.refusal(one) is None
    scheduler.release(one)
    assert scheduler.compiler.compiled(one) is None


def test_what_is_not_used_is_forgotten_in_order(scheduler, backend, sandbox, monkeypatch):
    monkeypatch.setattr(compilers, "MAX_ENTRIES", 3)
    sandbox.may_end.set()
    made = [grammars.regex(letter) for letter in "abcde"]
    for one in made:
        scheduler.order(one)
        assert scheduler.refusal(one) is None
    assert None not in [scheduler.compiler.compiled(one) for one in made], "all are in use"
    for one in made:
        scheduler.release(one)
    for one in reversed(made):
        scheduler.order(one)
        assert scheduler.refusal(one) is None
    assert backend.calls == [*"abcde", "b", "a"]


def test_the_memory_counts(scheduler, backend, sandbox, monkeypatch):
    monkeypatch.setattr(compilers, "MAX_CACHE_BYTES", 2500)
    sandbox.may_end.set()
    for letter in "abcddcba":
        one = grammars.regex(letter)
        scheduler.order(one)
        assert scheduler.refusal(one) is None
        scheduler.release(one)
    assert backend.calls == [*"abcd", "b", "a"], "two fit"


def test_closing_ends_what_runs_and_begins_no_more(scheduler, backend, sandbox):
    for number in range(NUM_WORKERS + 1):
        scheduler.order(grammars.Grammar(kind="regex", text=f"a{number}"))
    until(lambda: len(sandbox.tried) == NUM_WORKERS)
    scheduler.compiler.close()
    assert sandbox.is_closed
    assert len(sandbox.tried) == NUM_WORKERS
    assert "grammar-compiler" not in {thread.name for thread in threading.enumerate()}


def test_closing_does_not_wait_for_ever(scheduler, backend, sandbox, monkeypatch):
    monkeypatch.setattr(compilers, "CLOSE_LIMIT_S", 0.02)
    begun, may_end = threading.Event(), threading.Event()

    def compile_slowly(grammar):
        begun.set()
        may_end.wait(10)
        return Compiled()

    backend.compile = compile_slowly
    sandbox.may_end.set()
    scheduler.order(grammars.Grammar(kind="regex", text="a"))
    assert begun.wait(10)
    scheduler.compiler.close()
    assert not may_end.is_set()
    may_end.set()


def test_a_grammar_that_was_too_slow_is_refused_from_then_on(backend, sandbox, clock):
    scheduler = Scheduler(backend, sandbox, clock)
    sandbox.may_end.set()
    grammar = grammars.regex("slow")
    scheduler.compiler.take(CompileGrammar(id=1, grammar=grammar))
    until(lambda: 1 in scheduler.answers)
    scheduler.compiler.refuse_slow(grammar, "it takes too long")
    with pytest.raises(GrammarFailed, match="too long"):
        scheduler.compiler.compiled(grammar)
    # While another request still has it, and when none has.
    scheduler.compiler.take(CompileGrammar(id=2, grammar=grammar))
    for order in (1, 2):
        scheduler.compiler.take(ReleaseGrammar(id=order))
    scheduler.compiler.take(CompileGrammar(id=3, grammar=grammar))
    for order in (2, 3):
        refusal = scheduler.answers[order].refusal
        assert refusal is not None
        assert (refusal.status, refusal.message) == (400, "it takes too long")
    assert backend.calls == ["slow"]
    scheduler.compiler.close()


class Refusing(Sandbox):
    """The backend behind it can enforce nothing."""

    def begin(self, grammar):
        self.may_end.set()
        self.tried.append(grammar.text)
        return Trial(self.may_end, BackendRefused("it cannot"))


def test_what_one_backend_refuses_another_may_compile_once(backend, sandbox, clock):
    first, unused = Refusing(), Backend()
    answers: list[GrammarAnswer] = []
    sandbox.may_end.set()
    compiler = GrammarCompiler(
        [Way(lambda: unused, first), Way(lambda: backend, sandbox)],
        answers.append,
        patience_s=5.0,
        max_bytes=100,
        clock=clock,
    )
    for order, text in enumerate(("a", "hang")):
        compiler.take(CompileGrammar(id=order, grammar=grammars.regex(text)))
        until(lambda count=order: len(answers) > count)
    assert (first.tried, sandbox.tried) == (["a", "hang"], ["a", "hang"])
    assert (unused.calls, backend.calls) == ([], ["a"])
    assert answers[0].refusal is None
    assert answers[1].refusal is not None
    assert "it hangs" in (answers[1].refusal.message or "")
    compiler.close()


def test_the_first_backend_is_made_in_the_background(backend, clock):
    class Prepared(Sandbox):
        is_ready = False

        def prepare(self):
            self.is_ready = True

    sandbox, made = Prepared(), []
    compiler = GrammarCompiler(
        [Way(lambda: made.append(backend) or backend, sandbox), Way(lambda: 1 / 0, Sandbox())],
        lambda answer: None,
        patience_s=5.0,
        max_bytes=100,
        clock=clock,
    )
    compiler.prepare()
    until(lambda: bool(made))
    assert sandbox.is_ready
    compiler.close()
