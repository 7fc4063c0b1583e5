"""The process in which grammars are tried: python -m sapwood.executor.grammar.sandbox_process

It reads the tokenizer once. For each grammar it makes a copy of itself, which compiles the grammar
and follows it for some tokens within limits of time, memory and stack. Whatever a grammar does to a
compiler ends that copy only.

Standard input and output carry the messages of `sandbox.py`, one JSON text per line. The process
ends when its input does.
"""

from __future__ import annotations

import gc
import os
import resource
import selectors
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from sapwood.base.errors import InvalidRequest
from sapwood.executor.grammar.backends import make_one
from sapwood.executor.grammar.interface import (
    SLOW_BUDGET_S,
    SLOW_STEP_S,
    TOO_SLOW,
    DeadEnd,
    GrammarBackend,
    GrammarFailed,
    Matcher,
)
from sapwood.executor.grammar.sandbox import (
    MEMORY_BYTES,
    STACK_BYTES,
    Answer,
    Cancel,
    Setting,
    Trial,
)
from sapwood.executor.grammar.vocabulary import Vocabulary, vocabulary_of
from sapwood.schema.grammar import Grammar
from sapwood.text.tokenizer import Tokenizer

NICENESS = 10
"""Of a trial: the engine's own threads go first."""
FIRST_TOKENS = {"llguidance": 32, "xgrammar": 64}
"""Tokens that a trial follows of an output of first tokens. llguidance ends by itself what becomes
slow, after 30 characters of an expression such as `((a{1,1000}){1,1000}){1,1000}`."""
ANY_TOKENS = 8
"""Tokens that a trial follows of an output of any tokens."""
_BITS = [1 << bit if bit < 31 else -(1 << 31) for bit in range(32)]
PIECE_BYTES = 65536
PROCESS_SIZE = Path("/proc/self/statm")
"""Linux has it; elsewhere only time and stack are limited."""


def main() -> None:
    # Ctrl-C in a terminal reaches this process too; it ends when the engine closes its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What libraries print must not come between the messages.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    # Unbuffered: what comes after the first line is for `Trials`.
    messages = os.fdopen(0, "rb", buffering=0)
    line = messages.readline()
    if not line.endswith(b"\n"):
        return  # the engine ended before it had said anything
    setting = msgspec.json.decode(line, type=Setting)
    tokenizer = Tokenizer.from_directory(Path(setting.tokenizer_path))
    vocabulary = vocabulary_of(tokenizer, size=setting.vocab_size, ends=setting.ends)
    backend = make_one(setting.backend, setting.config, vocabulary)
    # Copies share these pages of memory for good if no garbage collection writes to them.
    gc.collect()
    gc.freeze()
    # A compiler that panics writes at length; nobody should read that.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    Trials(lambda grammar: try_out(backend, grammar, vocabulary), setting.timeout_s, answers).serve(
        messages.fileno()
    )


def try_out(backend: GrammarBackend, grammar: Grammar, vocabulary: Vocabulary) -> None:
    """Compile the grammar and follow two outputs of it for some tokens: one of the first token that
    may come at each place, as a rule a single character, and a shorter one of any tokens.

    Raises InvalidRequest if the grammar cannot be compiled, or is too slow to follow."""
    compiled = backend.compile(grammar)
    spare_s = SLOW_BUDGET_S
    for seed, num_tokens in ((None, FIRST_TOKENS[backend.name]), (0, ANY_TOKENS)):
        try:
            spare_s = _follow(compiled.matcher(), vocabulary, spare_s, seed, num_tokens)
        except GrammarFailed as error:
            raise InvalidRequest(
                f"the {grammar.kind} cannot be followed: {error}", param=grammar.kind
            ) from None


def _follow(
    matcher: Matcher, vocabulary: Vocabulary, spare_s: float, seed: int | None, num_tokens: int
) -> float:
    """Follow an output of a grammar, and return what is left of the time for slow steps.

    seed  of the tokens that are chosen; None: the one with the lowest id is
    Raises GrammarFailed if the time does not suffice"""
    masks = np.zeros((1, -(-vocabulary.size // 32)), dtype=np.int32)
    chosen = None if seed is None else np.random.default_rng(seed)
    for place in range(num_tokens):
        begin_s = time.thread_time()
        try:
            matcher.fill(masks, 0)
        except DeadEnd:
            if place == 0:
                raise
            break  # a way that a model need not go
        for end in vocabulary.ends:
            masks[0, end // 32] &= ~np.int32(_BITS[end % 32])
        words = np.flatnonzero(masks[0])
        if not len(words):
            break
        # The first token of the first group of 32, or of any.
        word = int(words[0] if chosen is None else chosen.choice(words))
        bits = int(masks[0, word]) & 0xFFFFFFFF
        if not matcher.accept(32 * word + (bits & -bits).bit_length() - 1):
            break
        spare_s -= max(0.0, time.thread_time() - begin_s - SLOW_STEP_S)
        if spare_s < 0:
            raise GrammarFailed(f"it {TOO_SLOW}")
    return spare_s


@dataclass(slots=True)
class _Copy:
    """A copy of this process that tries one grammar; `answer` is what it has written so far."""

    trial_id: int
    pid: int
    answer: bytearray = field(default_factory=bytearray)


class Trials:
    """Runs each trial in a copy of this process, several at a time.

    try_out    raises InvalidRequest if the grammar is to be refused
    timeout_s  a copy that runs longer is ended
    answers    where answers are written
    """

    def __init__(
        self, try_out: Callable[[Grammar], None], timeout_s: float, answers: BinaryIO
    ) -> None:
        self._try_out = try_out
        self._timeout_s = timeout_s
        self._answers = answers
        self._selector = selectors.DefaultSelector()
        self._copies: dict[int, _Copy] = {}
        self._unread = bytearray()
        self._decoder = msgspec.json.Decoder(Trial | Cancel)

    def serve(self, messages: int) -> None:
        """Serve until the file descriptor `messages` comes to its end."""
        self._selector.register(messages, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fd != messages:
                    self._read_answer(key.fd)
                elif not self._read_messages(messages):
                    self._end_all()
                    return

    def _read_messages(self, messages: int) -> bool:
        piece = os.read(messages, PIECE_BYTES)
        if not piece:
            return False
        self._unread += piece
        if b"\n" not in piece:
            return True
        *lines, rest = bytes(self._unread).split(b"\n")
        self._unread = bytearray(rest)
        for line in lines:
            message = self._decoder.decode(line)
            if isinstance(message, Trial):
                self._begin(message)
            else:
                self._cancel(message.id)
        return True

    def _begin(self, trial: Trial) -> None:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _run(self._try_out, trial, self._timeout_s, writer)
        os.close(writer)
        self._copies[reader] = _Copy(trial.id, pid)
        self._selector.register(reader, selectors.EVENT_READ)

    def _read_answer(self, reader: int) -> None:
        copy = self._copies[reader]
        piece = os.read(reader, PIECE_BYTES)
        if piece:
            copy.answer += piece
            return
        # The copy has ended.
        self._selector.unregister(reader)
        os.close(reader)
        del self._copies[reader]
        _, status = os.waitpid(copy.pid, 0)
        if copy.answer:
            self._answers.write(bytes(copy.answer))
            return
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else -1
        answer = Answer(id=copy.trial_id, ended_by=ended_by)
        self._answers.write(msgspec.json.encode(answer) + b"\n")

    def _cancel(self, trial_id: int) -> None:
        for copy in self._copies.values():
            if copy.trial_id == trial_id:
                os.kill(copy.pid, signal.SIGKILL)

    def _end_all(self) -> None:
        for copy in self._copies.values():
            os.kill(copy.pid, signal.SIGKILL)
            os.waitpid(copy.pid, 0)


def _run(try_out: Callable[[Grammar], None], trial: Trial, timeout_s: float, writer: int) -> None:
    """Try one grammar in a copy of the process, then end the copy; never returns."""
    status = 1
    try:
        _limit(timeout_s)
        try:
            try_out(trial.grammar)
            answer = Answer(id=trial.id)
        except InvalidRequest as error:
            answer = Answer(id=trial.id, refusal=error.message, param=error.param)
        except Exception as error:  # noqa: BLE001 - it is told to the client
            reason = f"{type(error).__name__}: {error}"
            answer = Answer(
                id=trial.id,
                refusal=f"the {trial.grammar.kind} cannot be compiled: {reason}"[:1000],
                param=trial.grammar.kind,
            )
        os.write(writer, msgspec.json.encode(answer) + b"\n")
        status = 0
    finally:
        # No exit handlers: they belong to the process that this is a copy of.
        os._exit(status)


def _limit(timeout_s: float) -> None:
    """Limit this process's time, memory and stack, and let other processes go first."""
    # SIGALRM's default action ends the process, also where it never returns from native code.
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    os.nice(NICENESS)
    limits = {resource.RLIMIT_STACK: STACK_BYTES, resource.RLIMIT_CORE: 0}
    if PROCESS_SIZE.exists():
        pages = int(PROCESS_SIZE.read_text().split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + MEMORY_BYTES
    for limit, most in limits.items():
        soft, hard = resource.getrlimit(limit)
        allowed = [most, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
        resource.setrlimit(limit, (min(allowed), hard))


if __name__ == "__main__":
    main()
