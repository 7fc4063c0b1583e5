"""Grammars compiled beside the engine's loop, each once, and kept as long as they are used."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Protocol

from sapwood.base.clock import Clock
from sapwood.base.errors import InvalidRequest, Overloaded, SapwoodError
from sapwood.executor.grammar.interface import CompiledGrammar, GrammarBackend
from sapwood.executor.grammar.sandbox import COMPILING_STACK_BYTES, TrialCancelled
from sapwood.schema.grammar import Grammar

log = logging.getLogger(__name__)

NUM_WORKERS = 4
CLOSE_LIMIT_S = 5.0
"""How long an engine that ends waits for the compilations that run."""
MAX_ENTRIES = 1024
MAX_CACHE_BYTES = 256 * 2**20
"""Beyond these limits, grammars that no open request needs are forgotten."""


class RunningTrial(Protocol):
    """A trial of one grammar."""

    def wait(self) -> None:
        """Wait for the trial's end.

        Raises SapwoodError if the grammar is refused, TrialCancelled if nobody waits for it.
        """
        ...

    def cancel(self) -> None:
        """End the trial early, since nobody waits for it any more."""
        ...


class Sandbox(Protocol):
    """Where grammars are tried, in bounded time, before the engine compiles them."""

    def begin(self, grammar: Grammar) -> RunningTrial: ...

    def close(self) -> None:
        """End the trials that run, and begin no more."""
        ...


@dataclass(slots=True, eq=False)
class _Entry:
    """A grammar that is known, and how far its compilation is.

    num_users  open requests that need the grammar
    since_s    when the grammar was put into the queue
    result     the compiled grammar, or why it cannot be used; None: not known yet
    trial      the trial of the grammar, while it runs
    """

    grammar: Grammar
    since_s: float
    num_users: int = 0
    result: CompiledGrammar | SapwoodError | None = None
    trial: RunningTrial | None = None

    @property
    def num_bytes(self) -> int:
        if isinstance(self.result, SapwoodError) or self.result is None:
            return len(self.grammar.text)
        return len(self.grammar.text) + self.result.num_bytes


class GrammarCompiler:
    """Safe to use from several threads.

    make_backend  called once, when the first grammar comes: it imports libraries and reads the
                  vocabulary
    sandbox       tries every grammar before it is compiled
    patience_s    a grammar whose turn has not come after that time is refused for now
    max_bytes     size of a grammar's text at most
    """

    def __init__(
        self,
        make_backend: Callable[[], GrammarBackend],
        sandbox: Sandbox,
        *,
        patience_s: float,
        max_bytes: int,
        clock: Clock,
    ) -> None:
        self._make_backend = make_backend
        self._sandbox = sandbox
        self._patience_s = patience_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._backend_lock = threading.Lock()
        self._backend: GrammarBackend | None = None
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._queue: deque[_Entry] = deque()
        self._workers: set[threading.Thread] = set()
        self._is_closed = False

    def close(self) -> None:
        """Begin no more compilations, and wait for those that run, up to CLOSE_LIMIT_S.

        To be called before the interpreter ends: a thread that comes back from native code after
        that takes the process down (std::terminate)."""
        with self._lock:
            self._is_closed = True
            self._queue.clear()
            workers = list(self._workers)
        self._sandbox.close()
        end_s = time.monotonic() + CLOSE_LIMIT_S
        for worker in workers:
            worker.join(max(0.0, end_s - time.monotonic()))

    def enter(self, grammar: Grammar) -> None:
        """A request that needs the grammar has come: compile the grammar unless it is known."""
        with self._lock:
            entry = self._entries.get(grammar.key)
            if entry is None:
                entry = self._entries[grammar.key] = _Entry(grammar, self._clock.now_s())
                self._begin(entry)
            entry.num_users += 1
            self._entries.move_to_end(grammar.key)

    def leave(self, grammar: Grammar) -> None:
        """A request that needed the grammar has ended."""
        with self._lock:
            entry = self._entries[grammar.key]
            entry.num_users -= 1
            if not entry.num_users and entry.result is None:
                self._abandon(entry)
            self._forget_some()

    def is_ready(self, grammar: Grammar) -> bool:
        """Whether a grammar that was entered is compiled; False: not yet.

        Raises InvalidRequest if it cannot be compiled, Overloaded if it can only be later."""
        with self._lock:
            result = self._entries[grammar.key].result
        if isinstance(result, SapwoodError):
            # A copy: each `raise` adds its frames to an error's traceback, and the requests that
            # these hold would live as long as the entry.
            raise copy(result)
        return result is not None

    def compiled(self, grammar: Grammar) -> CompiledGrammar | None:
        """The compiled form of a grammar that was ready; None if all requests that needed the
        grammar have left since."""
        with self._lock:
            entry = self._entries.get(grammar.key)
            if entry is None:
                return None
            result = entry.result
        assert result is not None, "a request has started before its grammar was compiled"
        assert not isinstance(result, SapwoodError), "a request has started without its grammar"
        return result

    @property
    def num_used(self) -> int:
        """Grammars that some open request needs."""
        with self._lock:
            return sum(entry.num_users > 0 for entry in self._entries.values())

    # ---- with the lock held ----------------------------------------------------------------------

    def _begin(self, entry: _Entry) -> None:
        size = len(entry.grammar.text.encode())
        if size > self._max_bytes:
            entry.result = InvalidRequest(
                f"the {entry.grammar.kind} has {size} bytes but this server compiles at most "
                f"{self._max_bytes}, its --grammar-max-bytes; make it smaller",
                param=entry.grammar.kind,
            )
            return
        self._queue.append(entry)
        if len(self._workers) < NUM_WORKERS and not self._is_closed:
            worker = threading.Thread(target=self._work, name="grammar-compiler", daemon=True)
            self._workers.add(worker)
            # The size is the whole process's until it is set again; a thread that starts meanwhile
            # only gets more than it needs.
            usual = threading.stack_size(COMPILING_STACK_BYTES)
            worker.start()
            threading.stack_size(usual)

    def _abandon(self, entry: _Entry) -> None:
        """All requests that needed the grammar have left: end its trial, or forget its turn."""
        if entry.trial is not None:
            entry.trial.cancel()
        elif entry in self._queue:
            self._queue.remove(entry)
            del self._entries[entry.grammar.key]

    def _next(self) -> _Entry | None:
        """The grammar to compile next; None if there is none: then the calling worker ends."""
        while self._queue and not self._is_closed:
            entry = self._queue.popleft()
            if self._clock.now_s() - entry.since_s <= self._patience_s:
                return entry
            entry.result = Overloaded(
                "the grammars of other requests are still being compiled, which takes long; try "
                "again later"
            )
        self._workers.discard(threading.current_thread())
        return None

    def _forget_some(self) -> None:
        """Forget grammars that no open request needs: those that were refused only for now, and
        beyond the limits the least recently used. Grammars in work stay."""
        num_bytes = sum(entry.num_bytes for entry in self._entries.values())
        for key, entry in list(self._entries.items()):
            if entry.num_users or entry.result is None:
                continue
            is_passing = isinstance(entry.result, Overloaded)
            if is_passing or len(self._entries) > MAX_ENTRIES or num_bytes > MAX_CACHE_BYTES:
                num_bytes -= entry.num_bytes
                del self._entries[key]

    # ---- in a worker's thread --------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._lock:
                entry = self._next()
            if entry is None:
                return
            result = self._compile(entry)
            with self._lock:
                entry.result = result
                entry.trial = None
                if result is None and entry.num_users:
                    # The trial was cancelled; a request that needs the grammar has come since.
                    entry.since_s = self._clock.now_s()
                    self._queue.append(entry)
                elif result is None:
                    del self._entries[entry.grammar.key]
                self._forget_some()

    def _compile(self, entry: _Entry) -> CompiledGrammar | SapwoodError | None:
        """None if the trial was cancelled."""
        grammar = entry.grammar
        try:
            trial = self._sandbox.begin(grammar)
            # The backend is made while the sandbox starts, or tries the grammar.
            backend = self._prepared()
            with self._lock:
                entry.trial = trial
                if not entry.num_users:
                    self._abandon(entry)
            trial.wait()
            return backend.compile(grammar)
        except TrialCancelled:
            return None
        except SapwoodError as error:
            return error.with_traceback(None)
        except Exception as error:
            log.exception("compiling a grammar failed")
            return InvalidRequest(
                f"the {grammar.kind} cannot be compiled: {type(error).__name__}: {error}",
                param=grammar.kind,
            )

    def _prepared(self) -> GrammarBackend:
        with self._backend_lock:
            if self._backend is None:
                self._backend = self._make_backend()
            return self._backend
