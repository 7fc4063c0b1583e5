"""`sapwood serve --placement ray`: each replica's processes in a placement group of a Ray cluster.

A bundle of a group is one machine's share of a replica's ranks. An actor there starts the same
processes that a machine without Ray would have, and tells their end; they end with the actor.
"""

from __future__ import annotations

import queue
import signal
import socket
from dataclasses import replace
from pathlib import Path
from subprocess import TimeoutExpired
from typing import IO, Any

import msgspec

from sapwood.app.engine_process import EngineProcessArgs
from sapwood.app.on_ray.library import join_cluster, load
from sapwood.app.ranks import rank_args
from sapwood.base.errors import StartupError
from sapwood.base.process import Child, end_in_order, hand_over, start_module, watch
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.parallel import LOCAL

Start = tuple[str, bytes]
"""A module that is run as a process, and the line that it is handed."""
CALLS = 4
"""That an actor answers at once: one waits for the end of its processes."""
ENGINE, RANK = "sapwood.app.engine_process", "sapwood.app.rank_process"


class Machine:
    """In an actor: a replica's processes on one machine."""

    def __init__(self, starts: list[Start]) -> None:
        self._codes: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._children = []
        for module, line in starts:
            child = start_module(module)
            hand_over(child, line)
            watch(child, lambda _, code: self._codes.put(code))
            self._children.append(child)

    def pid(self) -> int:
        return self._children[0].pid

    def exit_code(self) -> int:
        """Of the process that ends first, for which the call waits."""
        return self._codes.get()

    def send_signal(self, number: int) -> None:
        for child in self._children:
            child.send_signal(number)


class PlacedProcess:
    """The process with rank 0 of a replica, and its other ranks, as `base.process.Child`."""

    def __init__(self, ray: Any, actors: list[Any]) -> None:
        """actors: of the replica's machines, that of rank 0 first"""
        self._ray = ray
        self._actors = actors
        self._exit = actors[0].exit_code.remote()

    @property
    def pid(self) -> int:
        return int(self._ray.get(self._actors[0].pid.remote()))

    @property
    def stdin(self) -> IO[bytes] | None:
        return None

    def poll(self) -> int | None:
        ready, _ = self._ray.wait([self._exit], timeout=0)
        return self.wait() if ready else None

    def wait(self, timeout: float | None = None) -> int:
        try:
            return int(self._ray.get(self._exit, timeout=timeout))
        except self._ray.exceptions.GetTimeoutError:
            raise TimeoutExpired(ENGINE, timeout or 0.0) from None
        except self._ray.exceptions.RayError:
            return -signal.SIGKILL  # the actor is gone, and with it the process

    def kill(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)

    def send_signal(self, sig: int) -> None:
        self._actors[0].send_signal.remote(int(sig))


class RayPlacement:
    """Room for all replicas on a cluster. Close it in any case.

    host  address of this machine, which the engines reach
    """

    def __init__(self, config: EngineConfig, address: str | None, *, timeout_s: float) -> None:
        """Join the cluster at that address, or start one here for None, and reserve the room.

        StartupError if there is none after `timeout_s`."""
        self._ray = ray = join_cluster(address, shows_logs=True)
        self._util = load("ray.util")
        self._scheduling = load("ray.util.scheduling_strategies").PlacementGroupSchedulingStrategy
        self._running: dict[int, PlacedProcess] = {}
        parallel, resources = config.parallel, ray.cluster_resources()
        device = config.execution.device
        self._has_gpus = "GPU" in resources if device is None else device.startswith("cuda")
        num_ranks = parallel.dp_size * parallel.num_ranks
        self._num_threads = config.execution.num_threads
        if self._num_threads is None and not self._has_gpus:
            self._num_threads = max(1, int(resources.get("CPU", 1)) // num_ranks)
        self._bundle = {"CPU": (self._num_threads or 1) * parallel.ranks_per_node}
        if self._has_gpus:
            self._bundle["GPU"] = parallel.ranks_per_node
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self.host = "127.0.0.1" if len(nodes) == 1 else self._util.get_node_ip_address()
        self._groups = [
            self._util.placement_group([self._bundle] * parallel.nnodes, strategy="SPREAD")
            for _ in range(parallel.dp_size)
        ]
        ready, _ = ray.wait(
            [group.ready() for group in self._groups],
            num_returns=parallel.dp_size,
            timeout=timeout_s,
        )
        if len(ready) < parallel.dp_size:
            self.close()
            raise StartupError(
                f"the Ray cluster has no room for {parallel.dp_size} replicas of {parallel.nnodes} "
                f"times {self._bundle} after {timeout_s:g} s (--start-timeout); it has "
                f"{ {name: resources.get(name, 0) for name in self._bundle} }. Add nodes, or set "
                "--num-threads, --dp-size or --tp-size"
            )
        self._meetings: list[tuple[str, int] | None] = [
            ray.get(self._on_bundle(ray.remote(_free_address), group, 0).remote())
            if parallel.nnodes > 1
            else None
            for group in self._groups
        ]

    def start(self, replica: int, args: EngineProcessArgs) -> Child:
        """Start a replica's processes in its room, after those that ran there before."""
        self._end(replica)
        config = self._config_of(args.config, replica)
        own = msgspec.structs.replace(args, config=config, replica=0)
        starts = [[(ENGINE, msgspec.json.encode(own))]]
        for node in range(1, config.parallel.nnodes):
            starts.append(self._ranks(config, node, replica, args))
        actors = [
            self._on_bundle(
                self._ray.remote(Machine), self._groups[replica], bundle, max_concurrency=CALLS
            ).remote(of_bundle)
            for bundle, of_bundle in enumerate(starts)
        ]
        process = self._running[replica] = PlacedProcess(self._ray, actors)
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
            end_in_order(process, 0.0)

    def _config_of(self, config: EngineConfig, replica: int) -> EngineConfig:
        """That of one replica, which is alone in its room."""
        meeting = self._meetings[replica]
        parallel = replace(
            config.parallel,
            placement=LOCAL,
            dp_size=1,
            load_balance_method="auto",
            dist_init_addr=None if meeting is None else f"{meeting[0]}:{meeting[1]}",
        )
        execution = replace(config.execution, num_threads=self._num_threads)
        return replace(config, parallel=parallel, execution=execution)

    def _ranks(
        self, config: EngineConfig, node: int, replica: int, args: EngineProcessArgs
    ) -> list[Start]:
        """The processes of the ranks on one of the machines that lack rank 0."""
        of_node = replace(config, parallel=replace(config.parallel, node_rank=node))
        meeting = self._meetings[replica]
        assert meeting is not None, "several machines have one"
        host, port = meeting
        return [
            (
                RANK,
                msgspec.json.encode(
                    rank_args(
                        of_node,
                        rank,
                        host=host,
                        port=port,
                        home=Path(args.home),
                        log_level=args.log_level,
                    )
                ),
            )
            for rank in of_node.parallel.own_ranks
        ]

    def _on_bundle(self, remote: Any, group: Any, bundle: int, **options: Any) -> Any:
        """The function or class, so that it runs in that bundle."""
        return remote.options(
            **options,
            num_cpus=self._bundle["CPU"],
            num_gpus=self._bundle.get("GPU", 0),
            scheduling_strategy=self._scheduling(group, placement_group_bundle_index=bundle),
        )


def _free_address() -> tuple[str, int]:
    """(the address of the machine that runs this, a port that is free there)"""
    host = load("ray.util").get_node_ip_address()
    with socket.socket() as one:
        one.bind((host, 0))
        return host, one.getsockname()[1]
