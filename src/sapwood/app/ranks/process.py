"""A rank of an engine in a process of its own, started with `python -m` by the engine's process, or
on another machine by `sapwood serve` there. It does what the plans say that rank 0 sends."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from sapwood.app.building.engine_process import bind_as_asked, import_ahead
from sapwood.app.ranks.ranks import RankArgs
from sapwood.app.serving.observability import print_stacks_on_signal
from sapwood.base.errors import StartupError
from sapwood.base.process import end_with_parent, leave_signals_to_parent, read_first_line
from sapwood.distributed.link import Link, connect
from sapwood.observe.log import configure_logging
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.rank import (
    EndRank,
    PartsTask,
    RankFailed,
    RankHello,
    RankOrder,
    RankPool,
    RankReady,
    RankReport,
    RankStart,
    RunStep,
    WeightsTask,
)
from sapwood.schema.request import LoadAdapter, UnloadAdapter

if TYPE_CHECKING:
    from sapwood.app.building.runners import StepRunner

log = logging.getLogger(__name__)

M = TypeVar("M", bound=RankOrder)


class _Leader:
    """Rank 0, as this rank sees it."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._decode = msgspec.msgpack.Decoder(RankOrder).decode
        # A step may wait for other ranks for ever, and cannot be told that rank 0 is gone.
        link.on_end(self._on_end)
        self._is_ended = False

    def say(self, report: RankReport) -> None:
        self._link.send(msgspec.msgpack.encode(report))

    def next_order(self) -> RankOrder:
        message = self._link.receive()
        order = EndRank() if message is None else self._decode(message)
        self._is_ended |= isinstance(order, EndRank)
        return order

    def awaited(self, kind: type[M]) -> M:
        """The next order, which must be of that kind; SystemExit if the engine ends instead."""
        order = self.next_order()
        if isinstance(order, EndRank):
            sys.exit(0)
        assert isinstance(order, kind), f"rank 0 sent {type(order).__name__}"
        return order

    def smallest_pool(self, max_total_tokens: int) -> int:
        self.say(RankPool(max_total_tokens=max_total_tokens))
        return self.awaited(RankPool).max_total_tokens

    def _on_end(self) -> None:
        if not self._is_ended:
            os._exit(1)


def main() -> int:
    leave_signals_to_parent()
    importing = import_ahead("sapwood.app.ranks.member")
    also = import_ahead("sapwood.app.building.runners")
    try:
        line = read_first_line()
    except EOFError:
        os._exit(1)  # the parent has said why it ended
    args = msgspec.json.decode(line, type=RankArgs)
    end_with_parent()
    configure_logging(args.log_level)
    print_stacks_on_signal()
    try:
        link = connect(args.host, args.port, timeout_s=args.timeout_s)
    except OSError as error:
        log.error("rank %d cannot reach rank 0: %s", args.rank, error)
        return 1
    leader = _Leader(link)
    leader.say(
        RankHello(
            rank=args.rank,
            pid=os.getpid(),
            host=socket.gethostname(),
            token=args.token,
            options=args.options,
        )
    )
    try:
        importing.result()
        also.result()
        serve_rank(args, leader, link.own_host)
        return 0
    except StartupError as error:
        reason = error.message
    except Exception as error:  # noqa: BLE001 - the last stop: rank 0 is told, then this rank ends
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    leader.say(RankFailed(reason=reason))
    link.close()
    return 1


def serve_rank(args: RankArgs, leader: _Leader, own_host: str) -> None:
    """Load this rank's part of the model and run all plans, until rank 0 ends the engine."""
    # Imported here: this module is imported for its names, too, and torch takes seconds.
    from sapwood.app.building.loading import LoadWatch
    from sapwood.app.building.resolving import resolve_config
    from sapwood.app.building.runners import build_runner
    from sapwood.app.ranks.member import facts_of, member_of
    from sapwood.distributed.meeting import Meeting

    start = leader.awaited(RankStart)
    if (error := bind_as_asked(start.asked.execution.numa_node, args.rank)) is not None:
        raise error
    resolved = resolve_config(
        _own_options(start.asked, args),
        home=Path(args.home),
        rank=args.rank,
        decided=start.config,
    )
    meeting = Meeting.joined(
        args.host, start.meeting_port, own_host=own_host, timeout_s=args.timeout_s
    )
    member = member_of(args.rank, resolved, meeting, leader.smallest_pool)
    watch = LoadWatch()
    runner = build_runner(member.agreed(resolved), watch, member=member)
    leader.say(RankReady(facts=facts_of(args.rank, runner.resolved, watch)))
    gc.collect()
    gc.freeze()
    run_plans(runner, leader, args.rank)
    gc.unfreeze()


def run_plans(runner: StepRunner, leader: _Leader, rank: int) -> None:
    """Do what rank 0 says until it ends the engine. Adapters are loaded, and pages stored, beside
    the steps."""
    from sapwood.app.building.tiers import own_parts
    from sapwood.app.ranks.team_parts import PartKeeper
    from sapwood.app.ranks.team_weights import do_task

    loader = None if runner.adapters is None else runner.adapters.loader
    if loader is not None:
        loader.tell(leader.say)
    keeper = None
    if runner.copies is not None:
        keeper = PartKeeper(own_parts(runner.resolved, runner.copies, rank), leader.say)
    while not isinstance(order := leader.next_order(), EndRank):
        match order:
            case RunStep():
                runner.execute(order.plan)
            case LoadAdapter() if loader is not None:
                loader.load(order)
            case UnloadAdapter() if loader is not None:
                loader.unload(order.adapter_id)
            case WeightsTask():
                do_task(runner.memory, order, leader.say)
            case PartsTask() if keeper is not None:
                keeper.take(order)
            case _:
                raise AssertionError(f"rank 0 sent {type(order).__name__}")
    if loader is not None:
        loader.close()
    if keeper is not None:
        keeper.close()


def _own_options(asked: EngineConfig, args: RankArgs) -> EngineConfig:
    """What was asked of rank 0, with the options that each machine has for itself."""
    return replace(
        asked,
        execution=replace(asked.execution, device=args.device, num_threads=args.num_threads),
        parallel=replace(asked.parallel, node_rank=args.node_rank),
    )


if __name__ == "__main__":
    sys.exit(main())
