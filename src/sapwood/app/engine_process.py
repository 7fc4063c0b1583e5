"""An engine in a process of its own, started by `launch` with `python -m`."""

from __future__ import annotations

import gc
import logging
import sys
import traceback
from pathlib import Path

import msgspec

from sapwood.base.channel import ZmqReceiver, ZmqSender
from sapwood.base.errors import StartupError
from sapwood.base.process import end_with_parent, read_first_line
from sapwood.observe.log import configure_logging
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.output import EngineFatal, EngineOutput
from sapwood.schema.request import EngineInput


class EngineProcessArgs(msgspec.Struct, frozen=True, kw_only=True):
    """What the parent hands over.

    inbox   address from which requests come; outbox: where outputs go
    home    directory of cached models
    """

    config: EngineConfig
    home: str
    inbox: str
    outbox: str
    log_level: str


def main() -> int:
    args = msgspec.json.decode(read_first_line(), type=EngineProcessArgs)
    end_with_parent()
    configure_logging(args.log_level)
    outbox: ZmqSender[EngineOutput] = ZmqSender(args.outbox, bind=False)
    try:
        return serve(args, outbox)
    except StartupError as error:
        outbox.send(EngineFatal(error.message))
    except Exception as error:  # noqa: BLE001 - the last stop: the parent is told, then we end
        traceback.print_exc()
        outbox.send(EngineFatal(f"{type(error).__name__}: {error}"))
    outbox.close()
    return 1


def serve(args: EngineProcessArgs, outbox: ZmqSender[EngineOutput]) -> int:
    # Imported here so that a failure to import torch reaches the parent as a message too.
    from sapwood.app.wiring import build_engine, resolve_config

    resolved = resolve_config(args.config, home=Path(args.home))
    inbox: ZmqReceiver[EngineInput] = ZmqReceiver(args.inbox, EngineInput, bind=False)
    engine = build_engine(resolved, inbox, outbox)
    # What exists now lives as long as the engine: collections need not look at it again.
    gc.collect()
    gc.freeze()
    outbox.send(engine.ready)
    engine.loop.run()
    engine.executor.close()
    logging.getLogger(__name__).info("the engine has ended")
    outbox.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
