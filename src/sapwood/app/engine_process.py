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

from sapwood.app.observability import build_instruments, build_watchdog, print_stacks_on_signal
from sapwood.base.channel import ZmqReceiver, ZmqSender
from sapwood.base.errors import StartupError
from sapwood.base.process import end_with_parent, leave_signals_to_parent, read_first_line
from sapwood.observe.log import configure_logging
from sapwood.observe.watchdog import Watchdog
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.observability import ObservabilityConfig
from sapwood.schema.output import EngineFatal, EngineOutput
from sapwood.schema.request import EngineInput

FAREWELL_S = 0.5
"""So long the last message of a stuck engine has to get out of its process."""


class EngineProcessArgs(msgspec.Struct, frozen=True, kw_only=True):
    """What the parent hands over.

    inbox   address from which requests come; outbox: where outputs go
    home    directory of cached models
    observability  of the server, whose engine this is
    """

    config: EngineConfig
    home: str
    inbox: str
    outbox: str
    log_level: str
    observability: ObservabilityConfig = ObservabilityConfig()


def main() -> int:
    leave_signals_to_parent()
    # It takes longer than all else, and needs to know nothing of what the parent hands over.
    importing = import_ahead("sapwood.app.wiring")
    try:
        line = read_first_line()
    except EOFError:
        os._exit(1)  # the parent has said why it ended
    args = msgspec.json.decode(line, type=EngineProcessArgs)
    end_with_parent()
    configure_logging(args.log_level)
    print_stacks_on_signal()
    outbox: ZmqSender[EngineOutput] = ZmqSender(args.outbox, bind=False)
    watchdog = build_watchdog(args.observability, "the engine", lambda why: _farewell(args, why))
    watchdog.beat("importing torch")
    watchdog.start()
    try:
        importing.result()
        return serve(args, outbox, watchdog)
    except StartupError as error:
        outbox.send(EngineFatal(error.message))
    except Exception as error:  # noqa: BLE001 - the last stop: the parent is told, then we end
        traceback.print_exc()
        outbox.send(EngineFatal(f"{type(error).__name__}: {error}"))
    outbox.close()
    return 1


def import_ahead(module: str) -> Future[ModuleType]:
    """Import a module in a thread; the result raises what the import raised."""
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
    # Sockets belong to one thread each, and the one that has the other is stuck.
    outbox: ZmqSender[EngineOutput] = ZmqSender(args.outbox, bind=False)
    outbox.send(EngineFatal(reason))
    outbox.close()
    time.sleep(FAREWELL_S)


def serve(args: EngineProcessArgs, outbox: ZmqSender[EngineOutput], watchdog: Watchdog) -> int:
    # Imported here: what imports this module for the names in it does not need torch.
    from sapwood.app.loading import LoadWatch
    from sapwood.app.wiring import build_engine, resolve_config
    from sapwood.executor.profiler import TorchRecorder
    from sapwood.models.store.terminal import bar_on_terminal

    watchdog.beat("reading the model's configuration")
    # The parent has verified the files.
    resolved = resolve_config(args.config, home=Path(args.home), is_verified=True)
    inbox: ZmqReceiver[EngineInput] = ZmqReceiver(args.inbox, EngineInput, bind=False)
    instruments = build_instruments(args.observability, watchdog, TorchRecorder())
    watchdog.beat("building the model")
    watch = LoadWatch(watchdog.beat, bar_on_terminal())
    engine = build_engine(resolved, inbox, outbox, instruments=instruments, watch=watch)
    # What exists now lives as long as the engine: collections need not look at it again.
    gc.collect()
    gc.freeze()
    startup_s = time.time() - psutil.Process().create_time()
    outbox.send(msgspec.structs.replace(engine.ready, startup_s=startup_s))
    watchdog.rest()
    try:
        engine.loop.run()
    finally:
        engine.close()
    watchdog.stop()
    # What stays frozen would count as leaked at the interpreter's end.
    gc.unfreeze()
    instruments.close()
    logging.getLogger(__name__).info("the engine has ended")
    outbox.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
