"""Runs the components of modules: each call in an instance and a thread of its own, with limits.

The interface is that of SGLang's gateway (its WIT package smg:gateway), so its modules run here.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import wasmtime
from wasmtime.component import Component, Linker, Record

from sapwood.base.errors import InvalidRequest, Overloaded, SapwoodError
from sapwood.gateway.wasm import byte_lists

ON_REQUEST = ("smg:gateway/middleware-on-request", "on-request")
ON_RESPONSE = ("smg:gateway/middleware-on-response", "on-response")
Hook = tuple[str, str]
"""An interface and its function."""

MAX_MEMORIES = 4
MAX_INSTANCES = 64
MAX_TABLE_ELEMENTS = 100_000
MAX_STACK_BYTES = 1 << 20
MAX_OPEN_CALLS = 4
"""Calls of one module that run at a time; a module that hangs holds no more threads."""

_TICK_S = 0.01
_GRACE_S = 0.25
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,200}")
_VALUE = re.compile(r"[\t -~\x80-\xff]*")
_FRAMING = frozenset(
    {"connection", "content-length", "expect", "host", "keep-alive", "transfer-encoding", "upgrade"}
)

Headers = list[tuple[bytes, bytes]]


class ModuleFailed(SapwoodError):
    """A module gave no usable answer; the request is refused, since the module may be a guard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a module wants changed.

    headers_set      replace those with the same name; headers_add come after them
    headers_removed  in lower case
    body             None: stays
    """

    status: int | None
    headers_set: Headers
    headers_added: Headers
    headers_removed: frozenset[bytes]
    body: bytes | None

    def of_headers(self, headers: Sequence[tuple[bytes, bytes]]) -> Headers:
        gone = self.headers_removed | {name for name, _ in self.headers_set}
        kept = [pair for pair in headers if pair[0] not in gone]
        return [*kept, *self.headers_set, *self.headers_added]


@dataclass(frozen=True, slots=True)
class Rejection:
    status: int


Action = Changes | Rejection | None
"""None: go on as it is."""


class Runtime:
    """Compiles components and calls them.

    timeout_s         of a call
    max_memory_bytes  of each memory of a call
    """

    def __init__(self, *, timeout_s: float, max_memory_bytes: int) -> None:
        byte_lists.install()
        config = wasmtime.Config()
        config.epoch_interruption = True
        config.max_wasm_stack = MAX_STACK_BYTES
        self.timeout_s = timeout_s
        self._max_memory_bytes = max_memory_bytes
        self._engine = wasmtime.Engine(config)
        self._linker = Linker(self._engine)
        # Programs in Rust and C ask for clocks and environments; they get no files and no network.
        self._linker.add_wasip2()
        self._num_ticks = max(1, round(timeout_s / _TICK_S)) + 1
        self._num_running = 0
        self._running = threading.Condition()
        self._is_closed = False
        threading.Thread(target=self._tick, name="wasm-epochs", daemon=True).start()

    def close(self) -> None:
        with self._running:
            self._is_closed = True
            self._running.notify_all()

    def compile(self, content: bytes) -> Component:
        """InvalidRequest if this is no component."""
        try:
            return Component(self._engine, content)
        except wasmtime.WasmtimeError as error:
            raise InvalidRequest(
                f"this is no component ({str(error).splitlines()[0][:200]}); `wasm-tools component "
                "new` makes one of a module"
            ) from error

    def run(self, component: Component, hook: Hook, value: Record) -> Action:
        """Call the hook and wait for it: not for a thread that has other things to do.

        Raises ModuleFailed."""
        store = wasmtime.Store(self._engine)
        store.set_wasi(wasmtime.WasiConfig())
        store.set_limits(
            memory_size=self._max_memory_bytes,
            table_elements=MAX_TABLE_ELEMENTS,
            instances=MAX_INSTANCES,
            tables=MAX_INSTANCES,
            memories=MAX_MEMORIES,
        )
        with self._running:
            self._num_running += 1
            self._running.notify()
        try:
            store.set_epoch_deadline(self._num_ticks)
            instance = self._linker.instantiate(store, component)
            interface = instance.get_export_index(store, hook[0])
            index = instance.get_export_index(store, hook[1], interface)
            assert index is not None  # check_exports has found it
            function = instance.get_func(store, index)
            assert function is not None
            return _action(function(store, value))
        except (wasmtime.WasmtimeError, TypeError, ValueError, AttributeError) as error:
            raise ModuleFailed(_reason(error, self.timeout_s)) from error
        finally:
            with self._running:
                self._num_running -= 1
            store.close()

    def _tick(self) -> None:
        """Time goes on while modules run; their deadlines are counted in these ticks."""
        while True:
            with self._running:
                self._running.wait_for(lambda: self._num_running > 0 or self._is_closed)
                if self._is_closed:
                    return
            time.sleep(_TICK_S)
            self._engine.increment_epoch()


def check_exports(component: Component, hooks: Sequence[Hook]) -> None:
    """InvalidRequest if the component lacks one of these functions."""
    for interface, name in hooks:
        index = component.get_export_index(interface)
        if index is None or component.get_export_index(name, index) is None:
            raise InvalidRequest(f"the component does not export {interface} with {name}")


class Calls:
    """The calls of one module, at most MAX_OPEN_CALLS at a time.

    They run in threads that the process does not wait for at its end: a host function may block."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._free = asyncio.Semaphore(MAX_OPEN_CALLS)

    async def run(self, work: Callable[[], Action]) -> Action:
        """Raises what the work raises, ModuleFailed if it does not end, and Overloaded if the
        threads of the module stay busy."""
        try:
            async with asyncio.timeout(self._timeout_s + _GRACE_S):
                await self._free.acquire()
        except TimeoutError:
            raise Overloaded("a module of the gateway is busy; try again later") from None
        loop = asyncio.get_running_loop()
        result: Future[Action] = Future()

        def call() -> None:
            try:
                result.set_result(work())
            except BaseException as error:  # noqa: BLE001 - it is raised where the call is awaited
                result.set_exception(error)
            # The loop may have ended before a module that hangs.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._free.release)

        threading.Thread(target=call, name="wasm", daemon=True).start()
        try:
            async with asyncio.timeout(self._timeout_s + _GRACE_S):
                return await asyncio.wrap_future(result)
        except TimeoutError:
            raise ModuleFailed(f"it did not end within {self._timeout_s:g} s") from None


def record(**fields: Any) -> Record:
    """A record of the interface, whose fields have hyphens."""
    made = Record()
    for name, value in fields.items():
        setattr(made, name.replace("_", "-"), value)
    return made


def header_records(headers: Sequence[tuple[bytes, bytes]]) -> list[Record]:
    return [
        record(name=name.decode("latin-1"), value=value.decode("latin-1"))
        for name, value in headers
    ]


def _action(told: Any) -> Action:
    """ValueError if it asks for what cannot be."""
    if told is None:
        return None
    if isinstance(told, int):
        if not 400 <= told <= 599:
            raise ValueError(f"it rejects with {told}, which is no status of an error")
        return Rejection(told)
    status = told.status
    if status is not None and not 200 <= status <= 599:
        raise ValueError(f"it sets the status {status}, which is none of an answer")
    removed = [_name(name) for name in getattr(told, "headers-remove")]
    return Changes(
        status=status,
        headers_set=_pairs(getattr(told, "headers-set")),
        headers_added=_pairs(getattr(told, "headers-add")),
        headers_removed=frozenset(removed),
        body=getattr(told, "body-replace"),
    )


def _pairs(told: Sequence[Any]) -> Headers:
    pairs = []
    for each in told:
        if not _VALUE.fullmatch(each.value):
            raise ValueError(f"the header {each.name[:80]!r} has a value that no header can have")
        pairs.append((_name(each.name), each.value.encode("latin-1")))
    return pairs


def _name(text: str) -> bytes:
    name = text.lower()
    if not _NAME.fullmatch(name) or name in _FRAMING:
        raise ValueError(f"it changes the header {text[:80]!r}, which no module can")
    return name.encode("ascii")


def _reason(error: Exception, timeout_s: float) -> str:
    """For the log: the last line of a trap says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    if "interrupt" in str(error):
        return f"it did not end within {timeout_s:g} s"
    return text[:300]
