"""An engine in a process of its own, started by `launch` with `python -m`."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
import traceback
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from types import ModuleType

import msgspec
import psutil

from sapwood.app.ranks.ranks import RankTeam
from sapwood.app.serving.observability import (
    build_instruments,
    build_watchdog,
    print_stacks_on_signal,
)
from sapwood.base.channel import ZmqReceiver, ZmqSender
from sapwood.base.errors import ConfigError, StartupError
from sapwood.base.numa import bind_to_node, nodes_of
from sapwood.base.process import end_with_parent, leave_signals_to_parent, read_first_line
from sapwood.observe.log import configure_logging
from sapwood.observe.watchdog import Watchdog
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.observability import ObservabilityConfig
from sapwood.schema.output import EngineFatal, EngineOutput
from sapwood.schema.request import EngineInput

FAREWELL_S = 0.5
"""How long the last message of a stuck engine may take to leave its process."""


class EngineProcessArgs(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments that the parent process hands over.

    inbox   address from which requests come
    outbox  address to which outputs go
    home    directory of cached models
    observability  the options of the server to which this engine belongs
    replica  the engine's number among those of the server
    joint_folder  where this engine meets those with which it shares feed-forwards; "": nowhere
    """

    config: EngineConfig
    home: str
    inbox: str
    outbox: str
    log_level: str
    observability: ObservabilityConfig = ObservabilityConfig()
    replica: int = 0
    joint_folder: str = ""


def main() -> int:
    leave_signals_to_parent()
    # Importing takes longest, and needs nothing that the parent hands over.
    importing = import_ahead("sapwood.app.building.wiring")
    try:
        line = read_first_line()
    except EOFError:
        os._exit(1)  # the parent has said why it ended
    args = msgspec.json.decode(line, type=EngineProcessArgs)
    end_with_parent()
    configure_logging(args.log_level)
    print_stacks_on_signal()
    numa_error = bind_as_asked(args.config.execution.numa_node, args.replica)
    outbox: ZmqSender[EngineOutput] = ZmqSender(args.outbox, bind=False)
    watchdog = build_watchdog(args.observability, "the engine", lambda why: _farewell(args, why))
    watchdog.beat("importing torch")
    watchdog.start()
    team: RankTeam | None = None
    try:
        if numa_error is not None:
            raise numa_error
        if args.config.parallel.num_ranks > 1:
            team = RankTeam(
                args.config,
                home=Path(args.home),
                log_level=args.log_level,
                on_failed=lambda reason: _end_at_once(args, reason),
            )
        importing.result()
        return serve(args, outbox, watchdog, team)
    except StartupError as error:
        outbox.send(EngineFatal(error.message))
    except Exception as error:  # noqa: BLE001 - the last stop: the parent is told, then we end
        traceback.print_exc()
        outbox.send(EngineFatal(f"{type(error).__name__}: {error}"))
    if team is not None:
        team.close()
    outbox.close()
    return 1


def bind_as_asked(numa_node: str | None, number: int) -> ConfigError | None:
    """Bind this process to its node, the one of the list with its number; why that failed."""
    if numa_node is None:
        return None
    nodes = nodes_of(numa_node)
    try:
        if len(nodes) > 1 and number >= len(nodes):
            raise ConfigError(f"--numa-node has {len(nodes)} nodes, but none for part {number}")
        node = nodes[number if len(nodes) > 1 else 0]
        cores = bind_to_node(node)
    except ConfigError as error:
        return error
    logging.getLogger(__name__).info("bound to NUMA node %d, %d cores", node, len(cores))
    return None


def import_ahead(module: str) -> Future[ModuleType]:
    """Import a module in a thread; `result` raises the import's error."""
    imported: Future[ModuleType] = Future()

    def work() -> None:
        try:
            imported.set_result(import_module(module))
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is wanted
            imported.set_exception(error)

    threading.Thread(target=work, name="import", daemon=True).start()
    return imported


def _farewell(args: EngineProcessArgs, reason: str) -> None:
    """Tell the parent why this process is about to end, from whatever thread."""
    # A socket of its own: the existing one belongs to the thread that is stuck.
    outbox: ZmqSender[EngineOutput] = ZmqSender(args.outbox, bind=False)
    outbox.send(EngineFatal(reason))
    outbox.close()
    time.sleep(FAREWELL_S)


def _end_at_once(args: EngineProcessArgs, reason: str) -> None:
    """A rank has failed. The step that waits for it may never end, so neither can this process
    end in order; the other ranks end with it."""
    logging.getLogger(__name__).error("the engine ends: %s", reason)
    _farewell(args, reason)
    os._exit(1)


def serve(
    args: EngineProcessArgs,
    outbox: ZmqSender[EngineOutput],
    watchdog: Watchdog,
    team: RankTeam | None,
) -> int:
    # Imported here: other modules import this one for its names, and must not import torch.
    from sapwood.app.building.loading import LoadWatch
    from sapwood.app.building.resolving import resolve_config
    from sapwood.app.building.wiring import build_engine
    from sapwood.app.serving.joint_engines import JointEngines
    from sapwood.executor.profiler import TorchRecorder
    from sapwood.store.terminal import bar_on_terminal

    watchdog.beat("reading the model's configuration")
    # The parent has verified the files.
    resolved = resolve_config(
        args.config, home=Path(args.home), is_verified=True, replica=args.replica
    )
    inbox: ZmqReceiver[EngineInput] = ZmqReceiver(args.inbox, EngineInput, bind=False)
    joint = None
    if args.joint_folder:
        joint = JointEngines(Path(args.joint_folder), args.replica, inbox)
    instruments = build_instruments(args.observability, watchdog, TorchRecorder())
    watchdog.beat("building the model")
    watch = LoadWatch(watchdog.beat, bar_on_terminal())
    engine = build_engine(
        resolved, inbox, outbox, instruments=instruments, watch=watch, team=team, joint=joint
    )
    # All objects of now live as long as the engine: garbage collection can skip them.
    gc.collect()
    gc.freeze()
    startup_s = time.time() - psutil.Process().create_time()
    outbox.send(msgspec.structs.replace(engine.ready, startup_s=startup_s))
    watchdog.rest()
    engine.prepare_grammars()
    try:
        engine.run()
    finally:
        engine.close()
    watchdog.stop()
    # At the interpreter's end, frozen objects would count as leaked.
    gc.unfreeze()
    instruments.close()
    logging.getLogger(__name__).info("the engine has ended")
    outbox.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
