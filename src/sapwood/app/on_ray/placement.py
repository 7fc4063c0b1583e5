"""`sapwood serve --placement ray`: each replica's processes in a placement group of a Ray cluster.

A bundle of a group is one machine's share of a replica's ranks. An actor there starts the same
processes that a machine without Ray would have, and tells their end; they end with the actor.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import IO, Any

import msgspec

from sapwood.app.building.engine_process import EngineProcessArgs
from sapwood.app.on_ray.library import join_cluster, load
from sapwood.app.ranks.ranks import start_ranks
from sapwood.app.serving.engine_start import start_engine_process
from sapwood.base.errors import StartupError
from sapwood.base.process import Child, hand_over, watch
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.parallel import LOCAL

log = logging.getLogger(__name__)

Meeting = tuple[str, int]
"""(host, port) where the process with rank 0 waits for the ranks on other machines."""
LOOPBACK = "127.0.0.1"
CALLS = 4
"""That an actor answers at once: `run` takes as long as the processes do."""
POLL_S = 0.2


class Machine:
    """In an actor: a replica's processes on one machine."""

    def __init__(self) -> None:
        self._codes: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._children: list[Popen[bytes]] = []

    def meeting(self, host: str | None) -> Meeting:
        """A port that is free at that address of this machine; None: at the one that Ray uses."""
        host = host or str(load("ray.util").get_node_ip_address())
        with socket.socket() as one:
            one.bind((host, 0))
            return host, int(one.getsockname()[1])

    def run(self, line: bytes, folder: str, node: int, meeting: Meeting | None) -> int:
        """Start the processes; the exit code of the one that ends first.

        line    the EngineProcessArgs of the replica, encoded
        folder  from which relative paths count, if this machine has it
        node    number of this machine among those of the replica"""
        if Path(folder).is_dir():
            os.chdir(folder)
        args = msgspec.json.decode(line, type=EngineProcessArgs)
        config = config_on(args.config, node, meeting)
        if node == 0:
            engine = start_engine_process()
            own = msgspec.structs.replace(args, config=config, replica=0)
            hand_over(engine, msgspec.json.encode(own))
            self._children = [engine]
        else:
            assert meeting is not None, "several machines have one"
            host, port = meeting
            ranks = start_ranks(
                config, host=host, port=port, home=Path(args.home), log_level=args.log_level
            )
            self._children = [*ranks.values()]
        for child in self._children:
            watch(child, lambda _, code: self._codes.put(code))
        return self._codes.get()

    def send_signal(self, number: int) -> None:
        for child in self._children:
            child.send_signal(number)


class PlacedProcess:
    """The process with rank 0 of a replica, and its other ranks, as `base.process.Child`."""

    stdin: IO[bytes] | None = None

    def __init__(self, ray: Any, actors: Sequence[Any], exits: Sequence[Any]) -> None:
        """actors  of the replica's machines, that of rank 0 first
        exits   what their `run` returns; that of rank 0 counts, since it watches the others"""
        self._ray = ray
        self._actors = actors
        self._exits = exits

    def poll(self) -> int | None:
        ready, _ = self._ray.wait([self._exits[0]], timeout=0)
        return self.wait() if ready else None

    def wait(self, timeout: float | None = None) -> int:
        try:
            return int(self._ray.get(self._exits[0], timeout=timeout))
        except self._ray.exceptions.GetTimeoutError:
            raise TimeoutExpired("an engine on Ray", timeout or 0.0) from None
        except self._ray.exceptions.RayActorError as error:
            log.debug("the actor of an engine is gone: %s", error)
            return -signal.SIGKILL  # and with it the process
        except self._ray.exceptions.RayError as error:
            log.error("the actor of an engine could not start it: %s", error)
            return 1

    def kill(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)

    def send_signal(self, sig: int) -> None:
        for actor in self._actors:
            actor.send_signal.remote(int(sig))


class RayPlacement:
    """Room for all replicas on a cluster. Close it in any case.

    host  address of this machine, which the engines reach; None: all of them are on this machine
    """

    def __init__(
        self,
        config: EngineConfig,
        address: str | None,
        *,
        timeout_s: float,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Join the cluster at that address, or start one here for None, and reserve the room.

        is_stopped  asked while there is no room; True ends the wait with SystemExit
        Raises      StartupError if there is no room after `timeout_s`"""
        self._ray = ray = join_cluster(address, shows_logs=True)
        self._util = load("ray.util")
        self._scheduling = load("ray.util.scheduling_strategies").PlacementGroupSchedulingStrategy
        self._running: dict[int, PlacedProcess] = {}
        self.host = None if address is None else str(self._util.get_node_ip_address())
        self._parallel = parallel = config.parallel
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        device, self._num_threads = config.execution.device, config.execution.num_threads
        has_gpus = device is None and any("GPU" in one for one in resources)
        has_gpus |= device is not None and device.startswith("cuda")
        if self._num_threads is None and not has_gpus:
            cores = [int(one.get("CPU", 0)) for one in resources]
            num_bundles = parallel.dp_size * parallel.nnodes
            self._num_threads = threads_that_fit(cores, num_bundles, parallel.ranks_per_node)
        self._bundle = {"CPU": (self._num_threads or 1) * parallel.ranks_per_node}
        if has_gpus:
            self._bundle["GPU"] = parallel.ranks_per_node
        self._groups = [
            self._util.placement_group([self._bundle] * parallel.nnodes, strategy="SPREAD")
            for _ in range(parallel.dp_size)
        ]
        try:
            self._wait_for_room(timeout_s, is_stopped)
        except BaseException:
            self.close()
            raise

    def start(self, replica: int, args: EngineProcessArgs) -> Child:
        """Start a replica's processes in its room, after those that ran there before."""
        self._end(replica)
        execution = replace(args.config.execution, num_threads=self._num_threads)
        args = msgspec.structs.replace(args, config=replace(args.config, execution=execution))
        line, folder = msgspec.json.encode(args), str(Path.cwd())
        nodes = range(self._parallel.nnodes)
        actors = [self._actor(self._groups[replica], node) for node in nodes]
        meeting = None
        if len(nodes) > 1:
            # Ray hands its result to the calls below; this process does not wait for it.
            meeting = actors[0].meeting.remote(LOOPBACK if self.host is None else None)
        exits = [actors[node].run.remote(line, folder, node, meeting) for node in nodes]
        process = self._running[replica] = PlacedProcess(self._ray, actors, exits)
        return process

    def close(self) -> None:
        """End all processes and give the room back."""
        for replica in list(self._running):
            self._end(replica)
        for group in self._groups:
            self._util.remove_placement_group(group)
        self._ray.shutdown()

    def _end(self, replica: int) -> None:
        process = self._running.pop(replica, None)
        if process is not None:
            process.kill()  # also the actor of a process that has ended by itself keeps the room

    def _wait_for_room(self, timeout_s: float, is_stopped: Callable[[], bool]) -> None:
        waiting, end_s = [group.ready() for group in self._groups], time.monotonic() + timeout_s
        while waiting:
            _, waiting = self._ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            if waiting and is_stopped():
                sys.exit(0)
            if waiting and time.monotonic() > end_s:
                have = self._ray.available_resources()
                free = ", ".join(f"{have.get(name, 0):g} {name}" for name in self._bundle)
                need = ", ".join(f"{count} {name}" for name, count in self._bundle.items())
                raise StartupError(
                    f"after {timeout_s:g} s (--start-timeout) the Ray cluster has no room for "
                    f"{len(waiting)} of {len(self._groups)} replicas, each of which needs "
                    f"{self._parallel.nnodes} times {need}; left are {free}. Add nodes, or lower "
                    "--num-threads, --dp-size or --tp-size"
                )

    def _actor(self, group: Any, node: int) -> Any:
        """The actor of a machine, in the bundle with that number."""
        options = {
            "num_cpus": self._bundle["CPU"],
            "num_gpus": self._bundle.get("GPU", 0),
            "max_concurrency": CALLS,
            "scheduling_strategy": self._scheduling(group, placement_group_bundle_index=node),
        }
        return self._ray.remote(Machine).options(**options).remote()


def config_on(config: EngineConfig, node: int, meeting: Meeting | None) -> EngineConfig:
    """That of one replica, which is alone in its room, on one of its machines."""
    parallel = replace(
        config.parallel,
        placement=LOCAL,
        dp_size=1,
        load_balance_method="auto",
        node_rank=node,
        dist_init_addr=None if meeting is None else f"{meeting[0]}:{meeting[1]}",
    )
    return replace(config, parallel=parallel)


def threads_that_fit(cores: Sequence[int], num_bundles: int, ranks_per_bundle: int) -> int:
    """Threads of each rank with which that many bundles fit on nodes with so many cores, or 1."""
    for threads in range(max(cores, default=1), 1, -1):
        if sum(one // (threads * ranks_per_bundle) for one in cores) >= num_bundles:
            return threads
    return 1
