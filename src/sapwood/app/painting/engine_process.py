"""An engine that draws, in a process of its own, started with `python -m`."""

from __future__ import annotations

import gc
import logging
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import psutil

from sapwood.app.building.engine_process import import_ahead
from sapwood.app.serving.observability import build_watchdog, print_stacks_on_signal
from sapwood.base.channel import ZmqReceiver, ZmqSender
from sapwood.base.clock import MonotonicClock
from sapwood.base.errors import ConfigError, StartupError
from sapwood.base.process import end_with_parent, leave_signals_to_parent, read_first_line
from sapwood.observe.log import configure_logging
from sapwood.observe.watchdog import Watchdog
from sapwood.schema.config.observability import ObservabilityConfig
from sapwood.schema.config.painting import PaintingConfig
from sapwood.schema.painting import PainterFatal, PainterInput, PainterOutput, PainterReady

if TYPE_CHECKING:
    from sapwood.app.painting.loading import LoadedPipeline

MODULE = "sapwood.app.painting.engine_process"


class PainterProcessArgs(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments that the parent process hands over.

    model   folder with model_index.json
    inbox   address from which requests come
    outbox  address to which outputs go
    """

    model: str
    config: PaintingConfig
    inbox: str
    outbox: str
    log_level: str
    observability: ObservabilityConfig = ObservabilityConfig()


def main() -> int:
    leave_signals_to_parent()
    importing = import_ahead("sapwood.app.painting.loading")
    try:
        line = read_first_line()
    except EOFError:
        os._exit(1)  # the parent has said why it ended
    args = msgspec.json.decode(line, type=PainterProcessArgs)
    end_with_parent()
    configure_logging(args.log_level)
    print_stacks_on_signal()
    outbox: ZmqSender[PainterOutput] = ZmqSender(args.outbox, bind=False)
    watchdog = build_watchdog(
        args.observability, "the engine", lambda why: outbox.send(PainterFatal(why))
    )
    watchdog.beat("importing torch")
    watchdog.start()
    try:
        importing.result()
        return serve(args, outbox, watchdog)
    except StartupError as error:
        outbox.send(PainterFatal(error.message))
    except Exception as error:  # noqa: BLE001 - the last stop: the parent is told, then we end
        traceback.print_exc()
        outbox.send(PainterFatal(f"{type(error).__name__}: {error}"))
    outbox.close()
    return 1


def serve(args: PainterProcessArgs, outbox: ZmqSender[PainterOutput], watchdog: Watchdog) -> int:
    # Imported here: other modules import this one for its names, and must not import torch.
    from sapwood.app.painting.loading import load_painting, plan_painting
    from sapwood.diffusion.loop import PaintingLoop
    from sapwood.diffusion.scheduler import StepScheduler

    plan = plan_painting(args.model, args.config)
    loaded = load_painting(plan, beat=watchdog.beat)
    inbox: ZmqReceiver[PainterInput] = ZmqReceiver(args.inbox, PainterInput, bind=False)
    warm_notes = warmed(loaded, args.config, watchdog.beat)
    clock = MonotonicClock()
    loop = PaintingLoop(
        loaded.pipeline,
        StepScheduler(loaded.plan.limits, clock),
        inbox,
        outbox,
        clock=clock,
        text_cache_bytes=args.config.text_cache_bytes,
        adapters=loaded.adapters,
        room=plan.memory,
        heartbeat=watchdog,
        memory=process_memory,
    )
    gc.collect()
    gc.freeze()
    outbox.send(
        PainterReady(
            pipeline=plan.folder.pipeline,
            backend=plan.backend,
            traits=loaded.pipeline.traits,
            components=plan.folder.components,
            notes=(*plan.notes, *warm_notes),
            startup_s=time.time() - psutil.Process().create_time(),
            load_s=loaded.load_s,
        )
    )
    watchdog.rest()
    loop.run()
    watchdog.stop()
    gc.unfreeze()
    logging.getLogger(__name__).info("the engine has ended")
    outbox.close()
    return 0


def warmed(
    loaded: LoadedPipeline, config: PaintingConfig, beat: Callable[[str], None]
) -> list[str]:
    """Draw what --warmup asks for; a line about each size."""
    from sapwood.app.painting.warm_up import warm_up

    if not config.warmup:
        return []
    usual = loaded.pipeline.traits.defaults
    sizes = config.warmup_sizes
    if not sizes:
        if usual.width is None or usual.height is None:
            raise ConfigError(
                "this pipeline does not tell its usual size; name one with --warmup-resolutions"
            )
        sizes = ((usual.width, usual.height),)
    return warm_up(loaded.pipeline, sizes, loaded.plan.memory, beat=beat)


def process_memory() -> tuple[int, int]:
    """(bytes that this process has, the most that it has had)"""
    resident: int = psutil.Process().memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident, max(resident, peak * (1 if sys.platform == "darwin" else 1024))


if __name__ == "__main__":
    sys.exit(main())
