"""Tries grammars in a process of their own before the engine compiles them.

A grammar comes from a client, and native compilers take some of them badly: they recurse until the
stack ends, take minutes, or all memory. The engine compiles only grammars whose compilation ended
well in the sandbox, so that one request cannot take the others with it. A trial costs what the
compilation costs, and about ten milliseconds.
"""

from __future__ import annotations

import functools
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future

import msgspec

from sapwood.base.errors import InvalidRequest, Overloaded, SapwoodError
from sapwood.schema.config.grammar import GrammarConfig
from sapwood.schema.grammar import Grammar

log = logging.getLogger(__name__)

STACK_BYTES = 4 * 2**20
"""Stack of a trial. The engine's stacks are larger: COMPILING_STACK_BYTES in threads that compile,
and the 8 MiB of every process where tokens are matched. So a grammar that fits here fits there."""
COMPILING_STACK_BYTES = 4 * STACK_BYTES
MEMORY_BYTES = 2**30
"""Memory that a trial may take besides what its process has at the start."""
END_LIMIT_S = 5.0
"""How long `close` waits for the process to end by itself."""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """The first message: what the sandbox compiles for.

    tokenizer_path  a directory
    vocab_size      token ids of the model
    ends            ids that end an output
    backend         which of the backends compiles
    timeout_s       how long one trial may take
    """

    tokenizer_path: str
    vocab_size: int
    ends: list[int]
    config: GrammarConfig
    backend: str
    timeout_s: float


class Trial(msgspec.Struct, frozen=True, kw_only=True, tag="trial"):
    """Try a grammar. id: above 0."""

    id: int
    grammar: Grammar


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Nobody waits for that trial any more."""

    id: int


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a trial ended.

    refusal   why the backend refuses the grammar; None: it may be compiled
    ended_by  the signal that ended the trial; -1: the trial ended by itself, but without an
              answer; 0: the trial has answered
    """

    id: int
    refusal: str | None = None
    param: str | None = None
    ended_by: int = 0


class BackendRefused(InvalidRequest):
    """This backend cannot enforce the grammar, or not in time; another one may."""


class TrialCancelled(Exception):
    """Whoever waited for a trial has left, so that it was ended."""


class RunningTrial:
    """A trial that has begun.

    refusal  gives the error by which an answer refuses the grammar; None: it does not
    end      ends the trial early
    """

    def __init__(
        self, refusal: Callable[[Answer], SapwoodError | None], end: Callable[[], None]
    ) -> None:
        self.answer: Future[Answer] = Future()
        self._refusal = refusal
        self._end = end
        self._is_cancelled = False

    def cancel(self) -> None:
        """End the trial, since nobody waits for it any more."""
        self._is_cancelled = True
        self._end()

    def wait(self) -> None:
        """Wait for the trial's end. Raises SapwoodError if the grammar is refused, TrialCancelled
        if the trial was ended before it had answered."""
        answer = self.answer.result()
        if self._is_cancelled and answer.ended_by:
            raise TrialCancelled
        refusal = self._refusal(answer)
        if refusal is not None:
            raise refusal


class GrammarSandbox:
    """Safe to use from several threads. The first trial starts the process."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._running: dict[int, RunningTrial] = {}
        self._num_trials = 0
        self._is_closed = False

    def begin(self, grammar: Grammar) -> RunningTrial:
        with self._lock:
            if self._is_closed:
                raise Overloaded("the engine is ending")
            process = self._process = self._process or self._start()
            self._num_trials += 1
            trial_id = self._num_trials
            trial = RunningTrial(
                functools.partial(self._refusal, grammar),
                functools.partial(self._cancel, trial_id),
            )
            self._running[trial_id] = trial
            # Sent with the lock held: two messages must not mix.
            _send(process, Trial(id=trial_id, grammar=grammar))
        return trial

    def prepare(self) -> None:
        """Start the process, so that the first trial need not wait for it."""
        with self._lock:
            if not self._is_closed and self._process is None:
                self._process = self._start()

    def close(self) -> None:
        """End the process; trials that run fail. May be called twice."""
        with self._lock:
            self._is_closed = True
            process = self._process
        if process is None:
            return
        _close_input(process)
        try:
            process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "sapwood.executor.grammar.sandbox_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        threading.Thread(
            target=self._read, args=(process,), name="grammar-sandbox", daemon=True
        ).start()
        _send(process, self._setting)
        return process

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        """Hand the process's answers to those that wait for them, until the process ends."""
        assert process.stdout is not None
        with process.stdout as answers:
            for line in answers:
                answer = msgspec.json.decode(line, type=Answer)
                with self._lock:
                    trial = self._running.pop(answer.id)
                trial.answer.set_result(answer)
        with self._lock:
            left, self._running = self._running, {}
            self._process = None
            _close_input(process)
            if not self._is_closed:
                log.error("the process that tries grammars ended with %s", process.wait())
        for trial in left.values():
            trial.answer.set_exception(
                Overloaded("the process that tries grammars has ended; send the request again")
            )

    def _cancel(self, trial_id: int) -> None:
        with self._lock:
            if self._process is not None and trial_id in self._running:
                _send(self._process, Cancel(id=trial_id))

    def _refusal(self, grammar: Grammar, answer: Answer) -> SapwoodError | None:
        if answer.refusal is not None:
            return BackendRefused(answer.refusal, param=answer.param)
        if answer.ended_by == signal.SIGALRM:
            return InvalidRequest(
                f"the {grammar.kind} was not compiled within {self._setting.timeout_s:g} s, this "
                "server's --grammar-compile-timeout; make it simpler",
                param=grammar.kind,
            )
        if answer.ended_by:
            return InvalidRequest(
                f"the {grammar.kind} cannot be compiled: its parts are nested too deeply, or it "
                f"needs more than {MEMORY_BYTES >> 20} MiB (the compiler was ended by signal "
                f"{answer.ended_by}); make it simpler",
                param=grammar.kind,
            )
        return None


def _close_input(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.close()
    except BrokenPipeError:
        log.debug("the process that tries grammars has not read its last message")


def _send(process: subprocess.Popen[bytes], message: msgspec.Struct) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(message) + b"\n")
        process.stdin.flush()
    except (BrokenPipeError, ValueError):
        # The process has ended; `_read` finds that out and tells those that wait.
        log.debug("the process that tries grammars takes no more messages")
