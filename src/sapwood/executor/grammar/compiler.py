"""Grammars compiled beside a rank's steps, each once, and kept as long as they are used.

The scheduler orders and releases grammars by messages, and hears by a message how an order went.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sapwood.base.clock import Clock
from sapwood.base.errors import InvalidRequest, Overloaded, SapwoodError
from sapwood.executor.grammar.backends import cannot_be_enforced
from sapwood.executor.grammar.interface import CompiledGrammar, GrammarBackend, GrammarFailed
from sapwood.executor.grammar.sandbox import (
    COMPILING_STACK_BYTES,
    BackendRefused,
    TrialCancelled,
)
from sapwood.schema.grammar import Grammar
from sapwood.schema.output import Finish
from sapwood.schema.rank import CompileGrammar, GrammarAnswer, RankMessage

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

    def prepare(self) -> None:
        """Get ready for trials."""
        ...

    def begin(self, grammar: Grammar) -> RunningTrial: ...

    def close(self) -> None:
        """End the trials that run, and begin no more."""
        ...


@dataclass(slots=True, eq=False)
class Way:
    """A way to compile grammars.

    make     called once, when the first grammar comes this way: it imports libraries and reads the
             vocabulary
    sandbox  tries every grammar before it is compiled
    """

    make: Callable[[], GrammarBackend]
    sandbox: Sandbox
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _backend: GrammarBackend | None = None

    def prepared(self) -> GrammarBackend:
        with self._lock:
            if self._backend is None:
                self._backend = self.make()
            return self._backend


@dataclass(slots=True, eq=False)
class _Entry:
    """A grammar that is known, and how far its compilation is.

    since_s  when the grammar was put into the queue
    orders   ids of the orders that were not released yet
    result   the compiled grammar, or why it is refused; None: not known yet
    trial    the trial of the grammar, while it runs
    """

    grammar: Grammar
    since_s: float
    orders: set[int] = field(default_factory=set)
    result: CompiledGrammar | Finish | None = None
    trial: RunningTrial | None = None

    @property
    def num_bytes(self) -> int:
        if isinstance(self.result, Finish) or self.result is None:
            return len(self.grammar.text)
        return len(self.grammar.text) + self.result.num_bytes


class GrammarCompiler:
    """Safe to use from several threads.

    ways          a grammar goes the first of them on which it is not refused
    answer        sends an order's answer to the scheduler, from any thread, without waiting
    rank          this rank's number
    patience_s    a grammar whose turn has not come after that time is refused for now
    max_bytes     size of a grammar's text at most
    """

    def __init__(
        self,
        ways: Sequence[Way],
        answer: Callable[[GrammarAnswer], None],
        *,
        rank: int = 0,
        patience_s: float,
        max_bytes: int,
        clock: Clock,
    ) -> None:
        self._ways = ways
        self._answer = answer
        self._rank = rank
        self._patience_s = patience_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._ordered: dict[int, _Entry] = {}
        self._queue: deque[_Entry] = deque()
        self._workers: set[threading.Thread] = set()
        self._too_slow: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._preparing: threading.Thread | None = None
        self._is_closed = False

    def prepare(self) -> None:
        """Get ready in the background, so that the first grammar need not wait for imports."""
        first = self._ways[0]

        def work() -> None:
            try:
                first.sandbox.prepare()
                first.prepared()
            except InvalidRequest as error:
                log.info("outputs cannot be held to a grammar: %s", error.message)

        self._preparing = threading.Thread(target=work, name="grammar-preparation", daemon=True)
        self._preparing.start()

    def close(self) -> None:
        """Begin no more compilations, and wait for those that run, up to CLOSE_LIMIT_S.

        To be called before the interpreter ends: a thread that comes back from native code after
        that takes the process down (std::terminate)."""
        with self._lock:
            self._is_closed = True
            self._queue.clear()
            workers = [*self._workers, *([self._preparing] if self._preparing else [])]
        for way in self._ways:
            way.sandbox.close()
        end_s = time.monotonic() + CLOSE_LIMIT_S
        for worker in workers:
            worker.join(max(0.0, end_s - time.monotonic()))

    def take(self, message: RankMessage) -> None:
        """Obey a message of the scheduler. Every order is answered once, unless it is released
        before."""
        if isinstance(message, CompileGrammar):
            self._order(message)
        else:
            self._release(message.id)

    def _order(self, order: CompileGrammar) -> None:
        grammar = order.grammar
        with self._lock:
            entry = self._entries.get(grammar.key)
            is_new = entry is None
            if entry is None:
                entry = self._entries[grammar.key] = _Entry(grammar, self._clock.now_s())
            entry.orders.add(order.id)
            self._ordered[order.id] = entry
            self._entries.move_to_end(grammar.key)
            if grammar.key in self._too_slow:
                reason = self._too_slow[grammar.key]
                refusal = _refusal(InvalidRequest(reason, param=grammar.kind))
                entry.result = entry.result or refusal
                self._tell(order.id, refusal)
            elif is_new:
                self._begin(entry)
            elif entry.result is not None:
                self._tell(order.id, entry.result)

    def _release(self, order_id: int) -> None:
        with self._lock:
            entry = self._ordered.pop(order_id)
            entry.orders.remove(order_id)
            if not entry.orders and entry.result is None:
                self._abandon(entry)
            self._forget_some()

    def compiled(self, grammar: Grammar) -> CompiledGrammar | None:
        """The compiled form of a grammar that was ready; None if it was released since.

        Raises GrammarFailed if it was found to be too slow since."""
        with self._lock:
            if grammar.key in self._too_slow:
                raise GrammarFailed(self._too_slow[grammar.key])
            entry = self._entries.get(grammar.key)
            if entry is None:
                return None
            result = entry.result
        assert result is not None, "a request has started before its grammar was compiled"
        assert not isinstance(result, Finish), "a request has started without its grammar"
        return result

    def refuse_slow(self, grammar: Grammar, reason: str) -> None:
        """Refuse that grammar from now on: it was too slow to follow, and would be so again."""
        with self._lock:
            self._too_slow[grammar.key] = reason
            while len(self._too_slow) > MAX_ENTRIES:
                self._too_slow.popitem(last=False)

    @property
    def num_used(self) -> int:
        """Grammars that some open request needs."""
        with self._lock:
            return sum(bool(entry.orders) for entry in self._entries.values())

    # ---- with the lock held ----------------------------------------------------------------------

    def _begin(self, entry: _Entry) -> None:
        size = len(entry.grammar.text.encode())
        if size > self._max_bytes:
            error = InvalidRequest(
                f"the {entry.grammar.kind} has {size} bytes but this server compiles at most "
                f"{self._max_bytes}, its --grammar-max-bytes; make it smaller",
                param=entry.grammar.kind,
            )
            self._settle(entry, _refusal(error))
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
        """All orders of the grammar were released: end its trial, or forget its turn."""
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
            error = Overloaded(
                "the grammars of other requests are still being compiled, which takes long; try "
                "again later"
            )
            self._settle(entry, _refusal(error))
        self._workers.discard(threading.current_thread())
        return None

    def _forget_some(self) -> None:
        """Forget grammars without an order: those that were refused only for now, and beyond the
        limits the least recently used. Grammars in work stay."""
        num_bytes = sum(entry.num_bytes for entry in self._entries.values())
        for key, entry in list(self._entries.items()):
            if entry.orders or entry.result is None:
                continue
            is_passing = isinstance(entry.result, Finish) and entry.result.status == 503
            if is_passing or len(self._entries) > MAX_ENTRIES or num_bytes > MAX_CACHE_BYTES:
                num_bytes -= entry.num_bytes
                del self._entries[key]

    def _settle(self, entry: _Entry, result: CompiledGrammar | Finish) -> None:
        entry.result = result
        for order_id in entry.orders:
            self._tell(order_id, result)

    def _tell(self, order_id: int, result: CompiledGrammar | Finish) -> None:
        refusal = result if isinstance(result, Finish) else None
        self._answer(GrammarAnswer(id=order_id, rank=self._rank, refusal=refusal))

    # ---- in a worker's thread --------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._lock:
                entry = self._next()
            if entry is None:
                return
            result = self._compile(entry)
            with self._lock:
                entry.trial = None
                if result is not None:
                    self._settle(entry, result)
                elif entry.orders:
                    # The trial was cancelled; the grammar was ordered again since.
                    entry.since_s = self._clock.now_s()
                    self._queue.append(entry)
                else:
                    del self._entries[entry.grammar.key]
                self._forget_some()

    def _compile(self, entry: _Entry) -> CompiledGrammar | Finish | None:
        """None if the trial was cancelled."""
        grammar = entry.grammar
        reasons: list[str] = []
        try:
            for way in self._ways:
                try:
                    return self._by(way, entry)
                except BackendRefused as error:
                    reasons.append(error.message)
            return _refusal(cannot_be_enforced(grammar, reasons))
        except TrialCancelled:
            return None
        except SapwoodError as error:
            return _refusal(error)
        except Exception as error:
            log.exception("compiling a grammar failed")
            reason = f"{type(error).__name__}: {error}"
            return _refusal(
                InvalidRequest(
                    f"the {grammar.kind} cannot be compiled: {reason}", param=grammar.kind
                )
            )

    def _by(self, way: Way, entry: _Entry) -> CompiledGrammar:
        trial = way.sandbox.begin(entry.grammar)
        if way is self._ways[0]:
            # The backend is made while the sandbox starts, or tries the grammar. The others are
            # made only for what they are known to compile.
            way.prepared()
        with self._lock:
            entry.trial = trial
            if not entry.orders:
                self._abandon(entry)
        trial.wait()
        return way.prepared().compile(entry.grammar)


def _refusal(error: SapwoodError) -> Finish:
    return Finish(kind="error", message=error.message, status=error.status, error_type=error.type)
