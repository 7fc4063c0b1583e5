"""The other ranks of an engine, as the process with rank 0 sees them.

Rank 0 is in the process that has the scheduler. It starts the ranks of its own machine, waits for
those of other machines, and sends all of them every plan; they decide nothing. Torch-free, so that
the ranks' processes can import torch while this one does.
"""

from __future__ import annotations

import logging
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import TypeVar

import msgspec

from sapwood.base.errors import EngineUnavailable, StartupError
from sapwood.base.process import end_in_order, hand_over, start_module, watch
from sapwood.distributed.link import Link
from sapwood.schema.config.engine import EngineConfig, ResolvedConfig
from sapwood.schema.config.parallel import ParallelConfig, split_address
from sapwood.schema.output import RankFacts
from sapwood.schema.rank import (
    EndRank,
    Loaded,
    PartsTold,
    RankFailed,
    RankHello,
    RankOrder,
    RankPool,
    RankReady,
    RankReport,
    RankStart,
    RunStep,
    WeightsTold,
)
from sapwood.schema.step import StepPlan, StepResult

log = logging.getLogger(__name__)

T = TypeVar("T")

HELLO_S = 10.0
"""How long a connection may take to say which rank it is."""
HELLO_BYTES = 1 << 20
GRACE_S = 0.25
"""From the first sign of a failure until its reason is told. A rank that dies makes the exchanges
of all others fail, and these may be heard of first."""
EXIT_S = 5.0
"""How long ranks may take to end in order."""
OWN_OPTIONS = frozenset({"node_rank", "device", "num_threads"})
"""Options that may differ between the machines of one engine."""


class RankArgs(msgspec.Struct, frozen=True, kw_only=True):
    """What the process of a rank is handed.

    host, port  where rank 0 waits for it
    token       proves to rank 0 that this is its child; "" on other machines
    options     with which this machine's command was started, by name
    node_rank, device, num_threads  those of these options that count here, whatever rank 0 has
    """

    rank: int
    host: str
    port: int
    home: str
    log_level: str
    timeout_s: float
    token: str = ""
    options: dict[str, str | int | float | bool | None] = {}
    node_rank: int = 0
    device: str | None = None
    num_threads: int | None = None


class RankLost(EngineUnavailable):
    """A rank has ended or failed, and with it the whole engine."""


def start_ranks(
    config: EngineConfig, *, host: str, port: int, home: Path, log_level: str, token: str = ""
) -> dict[int, Popen[bytes]]:
    """Start this machine's processes of the ranks, rank 0 excepted. They end when this process
    does."""
    children = {}
    for rank in config.parallel.own_ranks:
        if rank == 0:
            continue
        args = RankArgs(
            rank=rank,
            host=host,
            port=port,
            home=str(home),
            log_level=log_level,
            timeout_s=config.parallel.dist_timeout,
            token=token,
            options=config.flat(),
            node_rank=config.parallel.node_rank,
            device=config.execution.device,
            num_threads=config.execution.num_threads,
        )
        children[rank] = start_module("sapwood.app.ranks.process")
        hand_over(children[rank], msgspec.json.encode(args))
    return children


class RankTeam:
    """All ranks but rank 0. Close the team in any case.

    on_failed  called once, from some thread, with the reason why the engine cannot go on
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        home: Path,
        log_level: str,
        on_failed: Callable[[str], None],
    ) -> None:
        """Start the ranks of this machine. StartupError if the others could not reach this one."""
        self._config = config
        self._on_failed = on_failed
        self._state = threading.Condition()
        self._links: dict[int, Link] = {}
        self._hearing: dict[int, threading.Thread] = {}
        self._pools: dict[int, int] = {}
        self._facts: dict[int, RankFacts] = {}
        self._loaded: queue.SimpleQueue[tuple[int, Loaded]] = queue.SimpleQueue()
        self._told: dict[int, dict[int, WeightsTold]] = {}
        self._parts_told: dict[int, dict[int, PartsTold]] = {}
        self._signs: list[tuple[bool, str]] = []
        self._failure: str | None = None
        self._stops: list[Callable[[], None]] = []
        self._is_closing = False
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(RankReport).decode
        self._token = secrets.token_hex(16)
        self._listener = _listen(config.parallel)
        self.host, port = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, name="ranks", daemon=True).start()
        self._children = start_ranks(
            config, host=self.host, port=port, home=home, log_level=log_level, token=self._token
        )
        for rank, child in self._children.items():
            watch(child, partial(self._on_exit, rank))

    @property
    def _others(self) -> range:
        return range(1, self._config.parallel.num_ranks)

    def start(self, config: ResolvedConfig, meeting_port: int) -> None:
        """Tell all ranks what to run, once all are there. RankLost if one is not."""
        self._wait_for(self._links, "connected")
        self.send(RankStart(asked=self._config, config=config, meeting_port=meeting_port))

    def smallest_pool(self, max_total_tokens: int) -> int:
        """The smallest KV pool of all ranks, in tokens, which each of them is told."""
        self._wait_for(self._pools, "measured their memory")
        smallest = min(max_total_tokens, *self._pools.values())
        self._pools.clear()
        self.send(RankPool(max_total_tokens=smallest))
        return smallest

    def ready(self) -> list[RankFacts]:
        """What all ranks say once they have their parts of the model. RankLost if one fails."""
        self._wait_for(self._facts, "loaded their parts of the model")
        return [self._facts[rank] for rank in self._others]

    def run(self, plan: StepPlan) -> None:
        """Have all ranks compute a step, after all earlier ones. RankLost if one is gone."""
        self.send(RunStep(plan=plan))

    def leading(
        self, execute: Callable[[StepPlan], StepResult]
    ) -> Callable[[StepPlan], StepResult]:
        """`execute` of rank 0, for a step that all ranks compute."""

        def run(plan: StepPlan) -> StepResult:
            self.run(plan)
            return execute(plan)

        return run

    @property
    def num_others(self) -> int:
        return len(self._others)

    def loaded(self) -> list[tuple[int, Loaded]]:
        """(rank, how a load ended there), of what has been heard since the last call"""
        found: list[tuple[int, Loaded]] = []
        while not self._loaded.empty():
            found.append(self._loaded.get())
        return found

    def told(self, number: int) -> dict[int, WeightsTold]:
        """By rank: how an order about weights ended. Waits for all; RankLost if one is gone."""
        found = self._told.setdefault(number, {})
        self._wait_for(found, "carried out an order about their weights")
        del self._told[number]
        return found

    def parts_told(self, number: int) -> dict[int, PartsTold]:
        """By rank: how an order about stored pages ended. As `told`."""
        found = self._parts_told.setdefault(number, {})
        self._wait_for(found, "answered for their parts of stored pages")
        del self._parts_told[number]
        return found

    def send(self, order: RankOrder) -> None:
        """Have all ranks do this after what they were sent before. RankLost if one is gone."""
        message = self._encode(order)
        for rank, link in self._links.items():
            try:
                link.send(message)
            except OSError as error:
                self._sign(True, f"rank {rank} is gone")
                raise RankLost(self.failure(wait_s=2 * GRACE_S) or "a rank is gone") from error

    def before_failure(self, stop: Callable[[], None]) -> None:
        """Call `stop` when a rank has failed, so that a step does not wait for it for ever."""
        with self._state:
            self._stops.append(stop)

    def failure(self, *, wait_s: float = 0.0) -> str | None:
        """Why the engine cannot go on, if a rank is the reason; waits that long for one."""
        with self._state:
            self._state.wait_for(lambda: self._failure is not None, wait_s)
            return self._failure

    def close(self) -> None:
        """End all ranks: in order, unless one has failed. May be called twice."""
        with self._state:
            if self._is_closing:
                return
            self._is_closing = True
            in_order = not self._signs
        self._listener.close()
        if in_order:
            message = self._encode(EndRank())
            for link in self._links.values():
                try:
                    link.send(message)
                except OSError as error:
                    log.warning("a rank had ended before it was told to: %s", error)
        for child in self._children.values():
            end_in_order(child, EXIT_S if in_order else 0.0)
        if in_order:
            for hearing in self._hearing.values():  # a rank hangs up once it has heard of the end
                hearing.join(EXIT_S)
        for link in self._links.values():
            link.close()

    # ---- what the ranks say ------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                connection, (host, *_) = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(
                target=self._hear, args=(Link(connection), str(host)), name="rank", daemon=True
            ).start()

    def _hear(self, link: Link, host: str) -> None:
        """Read all that one rank says."""
        hello = self._hello_of(link)
        if hello is None or not self._is_welcome(hello, host, link):
            link.close()
            return
        rank, has_spoken = hello.rank, False
        while (message := link.receive()) is not None:
            report = self._decode(message)
            with self._state:
                if isinstance(report, RankPool):
                    self._pools[rank] = report.max_total_tokens
                elif isinstance(report, RankReady):
                    self._facts[rank] = report.facts
                elif isinstance(report, Loaded):
                    self._loaded.put((rank, report))
                elif isinstance(report, WeightsTold):
                    self._told.setdefault(report.number, {})[rank] = report
                elif isinstance(report, PartsTold):
                    self._parts_told.setdefault(report.number, {})[rank] = report
                self._state.notify_all()
            if isinstance(report, RankFailed):
                has_spoken = True
                self._sign(False, f"rank {rank} failed: {report.reason}")
        if not has_spoken and rank not in self._children:
            self._sign(
                True, f"rank {rank} on {hello.host} has ended, or cannot be reached any more"
            )

    def _hello_of(self, link: Link) -> RankHello | None:
        link.set_timeout(HELLO_S)
        try:
            message = link.receive(max_bytes=HELLO_BYTES)
            hello = None if message is None else self._decode(message)
        except (TimeoutError, msgspec.DecodeError):
            return None
        link.set_timeout(None)
        return hello if isinstance(hello, RankHello) else None

    def _is_welcome(self, hello: RankHello, host: str, link: Link) -> bool:
        own = hello.rank in self._config.parallel.own_ranks
        if hello.rank not in self._others or (own and hello.token != self._token):
            log.warning("refused a connection from %s, which claims to be a rank", host)
            return False
        theirs, ours = hello.options, self._config.flat()
        for name in sorted(ours.keys() - OWN_OPTIONS):
            if theirs.get(name) != ours[name]:
                self._sign(
                    True,
                    f"rank {hello.rank} on {hello.host} was started with {name} = "
                    f"{theirs.get(name)!r}, but rank 0 with {ours[name]!r}; give all machines the "
                    "same options",
                )
                return False
        with self._state:
            if hello.rank in self._links:
                log.warning("refused a second rank %d from %s", hello.rank, host)
                return False
            self._links[hello.rank] = link
            self._hearing[hello.rank] = threading.current_thread()
            self._state.notify_all()
        return True

    # ---- failures ----------------------------------------------------------------------------

    def _on_exit(self, rank: int, what: str, code: int) -> None:
        self._sign(code < 0, f"the process of rank {rank} {what}")

    def _sign(self, is_certain: bool, reason: str) -> None:
        """Something that the failure of a rank shows itself by.

        is_certain  whether this is a cause, and cannot be a consequence of another rank's failure
        """
        with self._state:
            if self._is_closing:
                return
            self._signs.append((is_certain, reason))
            if len(self._signs) > 1:
                return
        threading.Timer(GRACE_S, self._conclude).start()

    def _conclude(self) -> None:
        with self._state:
            certain = [reason for is_certain, reason in self._signs if is_certain]
            self._failure = (certain or [self._signs[0][1]])[0]
            self._state.notify_all()
            if self._is_closing:
                return
            stops = list(self._stops)
        for stop in stops:
            stop()
        self._on_failed(self._failure)

    def _wait_for(self, found: Mapping[int, T], what: str) -> None:
        def is_over() -> bool:
            return self._failure is not None or len(found) == len(self._others)

        timeout_s = self._config.parallel.dist_timeout
        with self._state:
            in_time = self._state.wait_for(is_over, timeout_s)
            failure = self._failure
        if failure is not None:
            raise RankLost(failure)
        if not in_time:
            missing = ", ".join(str(rank) for rank in self._others if rank not in found)
            raise StartupError(
                f"after {timeout_s:g} s (--dist-timeout) these ranks have not {what}: {missing}; "
                "are all machines started, with the same --dist-init-addr?"
            )


@contextmanager
def explained_by(team: RankTeam | None) -> Iterator[None]:
    """What fails within, because a rank has failed, fails with that rank's reason."""
    try:
        yield
    except (RankLost, StartupError):
        raise
    except Exception as error:
        failure = None if team is None else team.failure(wait_s=4 * GRACE_S)
        if failure is None:
            raise
        raise RankLost(failure) from error


def _listen(parallel: ParallelConfig) -> socket.socket:
    """Where ranks connect: for those of this machine, any free port."""
    if parallel.nnodes == 1 or parallel.dist_init_addr is None:
        return socket.create_server(("127.0.0.1", 0))
    host, port = split_address(parallel.dist_init_addr)
    try:
        return socket.create_server((host, port), reuse_port=False)
    except OSError as error:
        raise StartupError(
            f"--dist-init-addr is {parallel.dist_init_addr}, where this machine cannot listen: "
            f"{error}; name an address of the machine with --node-rank 0, and a free port"
        ) from error
