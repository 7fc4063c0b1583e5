"""The API process's supervision of the engine process: start, watch, restart."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any, Generic, Protocol, TypeVar

from sapwood.app.serving.observability import STACKS_SIGNAL
from sapwood.base.channel import AsyncZmqReceiver, ZmqSender
from sapwood.base.process import Child, watch
from sapwood.engine.client import AsyncEngineClient
from sapwood.schema.output import EngineOutput

log = logging.getLogger(__name__)

ENGINE_EXIT_S = 10.0
"""How long to wait for a process to end before it is killed, and then until it is given up."""
LAST_WORDS_S = 0.5
"""How long to wait for the last message of an engine that has ended, which says why."""
STACKS_S = 0.5
"""How long an engine that never got ready may take to print its stacks."""
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0


class SupervisedClient(Protocol):
    """What a supervisor needs of the client in front of its engine, whatever the engine makes."""

    is_draining: bool

    @property
    def failure(self) -> str | None: ...

    @property
    def is_ready(self) -> bool: ...

    def deliver(self, message: Any) -> None: ...

    def fail(self, reason: str) -> None: ...

    def drain(self, timeout_s: float) -> None: ...

    def restart(self, sender: Any, reason: str) -> None: ...

    async def wait_for_change(self) -> None: ...

    async def wait_until_failed(self) -> None: ...


C = TypeVar("C", bound=SupervisedClient)

Spawn = Callable[[str, str], Child]
"""Starts an engine process; the arguments are the addresses of its inbox and of its outbox."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """At most `max_restarts` restarts within `window_s`, each after twice the delay before."""

    max_restarts: int
    window_s: float

    def delay_s(self, restarts_at_s: Sequence[float], now_s: float) -> float | None:
        """Seconds until the next start, given the times of earlier ones; None: no more starts."""
        num_recent = sum(now_s - at_s < self.window_s for at_s in restarts_at_s)
        if num_recent >= self.max_restarts:
            return None
        return float(min(FIRST_DELAY_S * 2**num_recent, MAX_DELAY_S))


@dataclass
class _Process:
    """One engine process and the sockets to it, which no other engine uses."""

    process: Child
    sender: ZmqSender[Any]
    receiver: AsyncZmqReceiver[Any]
    pump: asyncio.Task[None]
    exited: asyncio.Event = field(default_factory=asyncio.Event)

    async def close(self) -> None:
        self.pump.cancel()
        await asyncio.gather(self.pump, return_exceptions=True)
        _kill(self.process)
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.sender.close()
        self.receiver.close()


class ProcessSupervisor(Generic[C]):
    """Keeps one engine process behind `client`.

    connect  makes the client of what sends to the engine
    outputs  the union of the messages that the engine sends
    policy  when a dead engine is replaced; None: never
    host    address of this machine, which engines on other machines reach; None: they are here
    """

    def __init__(
        self,
        spawn: Spawn,
        sockets: Path,
        connect: Callable[[ZmqSender[Any]], C],
        outputs: object,
        *,
        start_timeout_s: float,
        policy: RestartPolicy | None,
        on_ready: Callable[[bool], None],
        on_failed: Callable[[str], None] | None = None,
        host: str | None = None,
    ) -> None:
        """Start the first engine.

        on_ready   called with whether this is the first engine that got ready
        on_failed  called with the reason why an engine has failed
        """
        self._spawn = spawn
        self._sockets = sockets
        self._outputs = outputs
        self._host = host
        self._start_timeout_s = start_timeout_s
        self._policy = policy
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._num_started = 0
        self._restarts_at_s: list[float] = []
        self.has_been_ready = False
        self._is_stopping = False
        sender, outbox = self._bind()
        self.client = connect(sender)
        self._engine = self._start(sender, outbox)

    @property
    def process(self) -> Child:
        return self._engine.process

    async def run(self) -> str:
        """Replace the engine as often as the policy allows. Returns why the last one failed."""
        while True:
            failure = await self._until_failed()
            if self._on_failed is not None and not self._is_stopping:
                self._on_failed(failure)
            delay_s = self._delay_s()
            if delay_s is None:
                return self._in_all(failure)
            log.error("the engine failed: %s; another one starts in %.1f s", failure, delay_s)
            await asyncio.sleep(delay_s)
            await self._replace(failure)

    def drain(self, timeout_s: float) -> None:
        self._is_stopping = True
        self.client.drain(timeout_s)

    async def end(self) -> str | None:
        """End the engine in order. Returns the reason if it had failed before; else None."""
        failure = None if self._is_stopping else self.client.failure
        self._is_stopping = True
        if self.client.failure is None and self.client.is_ready:
            self.client.drain(0.0)
            try:
                async with asyncio.timeout(ENGINE_EXIT_S):
                    await self._engine.exited.wait()
            except TimeoutError:
                log.warning("the engine did not end within %.0f s; killing it", ENGINE_EXIT_S)
        return None if failure is None else self._in_all(failure)

    async def close(self) -> None:
        await self._engine.close()

    # ---- inside ------------------------------------------------------------------------------

    async def _until_failed(self) -> str:
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await self.client.wait_for_change()
        except TimeoutError:
            # Before its end, the engine prints where it is stuck.
            self._engine.process.send_signal(STACKS_SIGNAL)
            await asyncio.sleep(STACKS_S)
            self.client.fail(f"the engine was not ready after {self._start_timeout_s:g} s")
        if self.client.failure is None:
            self._on_ready(not self.has_been_ready)
            self.has_been_ready = True
            await self.client.wait_until_failed()
        assert self.client.failure is not None
        return self.client.failure

    def _delay_s(self) -> float | None:
        """Seconds until the next start; None if there is none, as for an engine never ready."""
        if self._policy is None or not self.has_been_ready or self._is_stopping:
            return None
        return self._policy.delay_s(self._restarts_at_s, time.monotonic())

    async def _replace(self, failure: str) -> None:
        await self._engine.close()
        self._restarts_at_s.append(time.monotonic())
        sender, outbox = self._bind()
        self.client.restart(sender, f"the engine is being restarted, because it failed: {failure}")
        self._engine = self._start(sender, outbox)

    def _in_all(self, failure: str) -> str:
        times = len(self._restarts_at_s)
        return f"{failure} (after {times} restarts)" if times else failure

    def _bind(self) -> tuple[ZmqSender[Any], str]:
        """(what is bound to a new address, another new address, for outputs): late messages of an
        earlier engine then reach nobody."""
        self._num_started += 1
        if self._host is not None:
            inbox = outbox = f"tcp://{self._host}:*"
        else:
            inbox, outbox = (
                f"ipc://{self._sockets}/{name}-{self._num_started}"
                for name in ("requests", "outputs")
            )
        return ZmqSender(inbox, bind=True), outbox

    def _start(self, sender: ZmqSender[Any], outbox: str) -> _Process:
        receiver: AsyncZmqReceiver[Any] = AsyncZmqReceiver(outbox, self._outputs, bind=True)
        engine = _Process(
            process=self._spawn(sender.address, receiver.address),
            sender=sender,
            receiver=receiver,
            pump=asyncio.create_task(_pump(receiver, self.client)),
        )
        loop = asyncio.get_running_loop()

        def on_exit(what: str, code: int) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody waits for the exit
                loop.call_soon_threadsafe(self._on_exit, engine, what, code)

        watch(engine.process, on_exit)
        return engine

    def _on_exit(self, engine: _Process, what: str, code: int) -> None:
        engine.exited.set()
        if code == 0 and self.client.is_draining:
            return
        # The engine's message with the reason may still be in the socket: it is read first.
        delay_s = 0.0 if code < 0 else LAST_WORDS_S
        loop = asyncio.get_running_loop()
        loop.call_later(delay_s, self._fail, engine, f"the engine process {what}")

    def _fail(self, engine: _Process, reason: str) -> None:
        if engine is self._engine:
            self.client.fail(reason)


class EngineSupervisor(ProcessSupervisor[AsyncEngineClient]):
    """Keeps the process of a language model's engine; arguments as those of ProcessSupervisor."""

    def __init__(
        self,
        spawn: Spawn,
        sockets: Path,
        *,
        start_timeout_s: float,
        policy: RestartPolicy | None,
        on_ready: Callable[[bool], None],
        on_failed: Callable[[str], None] | None = None,
        host: str | None = None,
    ) -> None:
        super().__init__(
            spawn,
            sockets,
            AsyncEngineClient,
            EngineOutput,
            start_timeout_s=start_timeout_s,
            policy=policy,
            on_ready=on_ready,
            on_failed=on_failed,
            host=host,
        )


async def _pump(receiver: AsyncZmqReceiver[Any], client: SupervisedClient) -> None:
    async for message in receiver.messages():
        client.deliver(message)


def _kill(process: Child) -> None:
    if process.poll() is not None:
        return
    process.kill()
    try:
        process.wait(ENGINE_EXIT_S)
    except TimeoutExpired:
        log.error("an engine process cannot be killed")
