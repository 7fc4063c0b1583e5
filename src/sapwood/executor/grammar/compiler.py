"""Grammars compiled beside the engine's loop, each once, and kept as long as they are used."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field

from sapwood.base.clock import Clock
from sapwood.base.errors import InvalidRequest, Overloaded, SapwoodError
from sapwood.executor.grammar.interface import CompiledGrammar, GrammarBackend
from sapwood.schema.grammar import Grammar

log = logging.getLogger(__name__)

NUM_WORKERS = 2
MAX_ABANDONED = 4
"""Compilations that took too long cannot be stopped; while this many run on, no other starts."""
CLOSE_LIMIT_S = 5.0
"""So long the end of the engine waits for compilations that run."""
MAX_ENTRIES = 1024
MAX_CACHE_BYTES = 256 * 2**20
"""Limits of what is kept unused."""


@dataclass(slots=True, eq=False)
class _Entry:
    """One (kind, text). `result` is set once; `since_s` when its compilation began."""

    grammar: Grammar
    num_users: int = 0
    result: CompiledGrammar | SapwoodError | None = None
    since_s: float | None = None
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def num_bytes(self) -> int:
        if isinstance(self.result, SapwoodError) or self.result is None:
            return len(self.grammar.text)
        return len(self.grammar.text) + self.result.num_bytes


class GrammarCompiler:
    """Safe to use from several threads.

    make_backend  called once, when the first grammar comes: it imports, and reads the vocabulary
    timeout_s     a grammar that takes longer is refused; making the backend is not counted
    max_bytes     of a grammar's text
    """

    def __init__(
        self,
        make_backend: Callable[[], GrammarBackend],
        *,
        timeout_s: float,
        max_bytes: int,
        clock: Clock,
    ) -> None:
        self._make_backend = make_backend
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._backend_lock = threading.Lock()
        self._backend: GrammarBackend | None = None
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._queue: list[_Entry] = []
        self._num_running = 0
        self._num_abandoned = 0
        self._threads: set[threading.Thread] = set()
        self._is_closed = False

    def close(self) -> None:
        """Begin no more compilations, and wait for those that run, up to CLOSE_LIMIT_S.

        To be called before the interpreter ends: a thread that comes back from native code after
        that takes the process down (std::terminate)."""
        with self._lock:
            self._is_closed = True
            self._queue.clear()
            threads = list(self._threads)
        end_s = time.monotonic() + CLOSE_LIMIT_S
        for thread in threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def enter(self, grammar: Grammar) -> None:
        """A request has come that needs it: compile it unless it is known."""
        with self._lock:
            self._give_up_what_is_late()
            entry = self._entries.get(grammar.key)
            if entry is None:
                entry = self._entries[grammar.key] = _Entry(grammar)
                self._begin(entry)
            entry.num_users += 1
            self._entries.move_to_end(grammar.key)

    def leave(self, grammar: Grammar) -> None:
        """A request that needed it has ended."""
        with self._lock:
            self._entries[grammar.key].num_users -= 1
            self._forget_some()

    def is_ready(self, grammar: Grammar) -> bool:
        """Whether it is compiled; False: not yet. Of a grammar that was entered.

        Raises InvalidRequest if it cannot be, Overloaded if it could only later."""
        with self._lock:
            self._give_up_what_is_late()
            result = self._entries[grammar.key].result
            if isinstance(result, SapwoodError):
                # A copy: each `raise` adds its frames to an error's traceback, and the requests
                # that these hold would live as long as the entry.
                raise copy(result)
            return result is not None

    def compiled(self, grammar: Grammar) -> CompiledGrammar | None:
        """Of a grammar that is ready; None if all requests that needed it have left since."""
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

    # ---- with the lock held, except `_work` and `_prepared` --------------------------------------

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
        self._start_workers()

    def _start_workers(self) -> None:
        while self._queue and self._num_running < NUM_WORKERS and not self._is_closed:
            if self._num_abandoned >= MAX_ABANDONED:
                for entry in self._queue:
                    entry.result = Overloaded(
                        "grammars of other requests, which took too long, are still being "
                        "compiled; try again later"
                    )
                self._queue.clear()
                return
            self._num_running += 1
            entry = self._queue.pop(0)
            # A daemon: a compilation without an end must not keep the process.
            thread = threading.Thread(
                target=self._work, args=(entry,), name="grammar-compiler", daemon=True
            )
            self._threads.add(thread)
            thread.start()

    def _work(self, entry: _Entry) -> None:
        result: CompiledGrammar | SapwoodError
        try:
            backend = self._prepared()
            with self._lock:
                entry.since_s = self._clock.now_s()
            result = backend.compile(entry.grammar)
        except InvalidRequest as error:
            result = error.with_traceback(None)
        except Exception as error:
            log.exception("compiling a grammar failed")
            result = InvalidRequest(
                f"the {entry.grammar.kind} cannot be compiled: {type(error).__name__}: {error}",
                param=entry.grammar.kind,
            )
        with self._lock:
            if entry.result is None:
                entry.result = result
                self._num_running -= 1
            else:
                self._num_abandoned -= 1
            self._threads.discard(threading.current_thread())
            self._start_workers()
            self._forget_some()
        entry.done.set()

    def _prepared(self) -> GrammarBackend:
        with self._backend_lock:
            if self._backend is None:
                self._backend = self._make_backend()
            return self._backend

    def _give_up_what_is_late(self) -> None:
        """All of them, not only the entry that somebody asks for: a client that has left asks no
        more, and its compilation would keep a worker from all others."""
        now_s = self._clock.now_s()
        late = [
            entry
            for entry in self._entries.values()
            if entry.result is None
            and entry.since_s is not None
            and now_s - entry.since_s > self._timeout_s
        ]
        for entry in late:
            self._give_up(entry)

    def _give_up(self, entry: _Entry) -> None:
        entry.result = InvalidRequest(
            f"the {entry.grammar.kind} was not compiled within {self._timeout_s:g} s, this "
            "server's --grammar-compile-timeout; make it simpler",
            param=entry.grammar.kind,
        )
        self._num_running -= 1
        self._num_abandoned += 1
        self._start_workers()

    def _forget_some(self) -> None:
        """Within the limits, the least recently used stay; so do those in use or in work. What is
        only refused for now does not stay."""
        num_bytes = sum(entry.num_bytes for entry in self._entries.values())
        for key, entry in list(self._entries.items()):
            if entry.num_users or entry.result is None:
                continue
            is_passing = isinstance(entry.result, Overloaded)
            if is_passing or len(self._entries) > MAX_ENTRIES or num_bytes > MAX_CACHE_BYTES:
                num_bytes -= entry.num_bytes
                del self._entries[key]
