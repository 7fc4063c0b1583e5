"""Builds the observers of a server's two processes, as the options say. Torch-free."""

from __future__ import annotations

import asyncio
import faulthandler
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sapwood.engine.instruments import Instruments, StatusLog
from sapwood.frontends.serving.services import Services
from sapwood.observe.metrics import Buckets, Metrics
from sapwood.observe.profiling import ProfileSession, Recorder
from sapwood.observe.request_log import RequestLog, open_sinks
from sapwood.observe.requests import RequestObserver
from sapwood.observe.tracing import EngineSpans, Tracing, open_tracing
from sapwood.observe.watchdog import Watchdog
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.observability import ObservabilityConfig

STACKS_SIGNAL = signal.SIGUSR1
"""A process that gets this signal prints every thread's stack and goes on."""

HEARTBEAT_S = 0.5

_BUCKETS = {
    "ttft": "bucket_time_to_first_token",
    "itl": "bucket_inter_token_latency",
    "e2e": "bucket_e2e_request_latency",
    "prompt_tokens": "prompt_tokens_buckets",
    "generation_tokens": "generation_tokens_buckets",
}


def build_observer(config: ObservabilityConfig, engine: EngineConfig) -> RequestObserver:
    """The observer of requests in the API process. ConfigError if traces cannot be sent."""
    model = engine.model.served_model_name or engine.model.model
    given = {name: config.buckets(option) for name, option in _BUCKETS.items()}
    metrics = Metrics(
        model,
        buckets=Buckets(**{name: bounds for name, bounds in given.items() if bounds is not None}),
        custom_labels=config.custom_labels,
        compat=config.metrics_compat,
    )
    # Opened even if the log is off: /configure_logging may turn it on.
    log = RequestLog(
        open_sinks(config.log_targets, "requests"),
        enabled=config.log_requests,
        level=config.log_requests_level,
        as_json=config.log_requests_format == "json",
    )
    about: dict[str, Any] = {
        "version": version("sapwood"),
        "model": model,
        "options": engine.shown(),
    }
    return RequestObserver(
        metrics,
        log=log,
        tracing=build_tracing(config, "sapwood-api"),
        crash_dump_folder=Path(config.crash_dump_folder) if config.crash_dump_folder else None,
        export=open_sinks(folder, "metrics") if (folder := _export_folder(config)) else (),
        about=about,
    )


def _export_folder(config: ObservabilityConfig) -> tuple[str, ...]:
    folder = config.export_metrics_to_file_dir
    return () if folder is None else (folder,)


def build_instruments(
    config: ObservabilityConfig, watchdog: Watchdog, recorder: Recorder
) -> Instruments:
    """The instruments of the loop in the engine process."""
    tracing = build_tracing(config, "sapwood-engine")
    every_s = config.log_scheduler_status_interval
    status_log = StatusLog(
        num_steps=config.decode_log_interval,
        interval_s=every_s,
        sinks=open_sinks(config.log_targets, "scheduler") if every_s else (),
    )
    return Instruments(
        heartbeat=watchdog,
        spans=None if tracing is None else EngineSpans(tracing),
        profile=ProfileSession(recorder),
        status_log=status_log if config.decode_log_interval or every_s else None,
    )


def build_watchdog(
    config: ObservabilityConfig, what: str, on_stuck: Callable[[str], None] | None = None
) -> Watchdog:
    return Watchdog(
        what,
        soft_timeout_s=config.soft_watchdog_timeout,
        hard_timeout_s=config.watchdog_timeout,
        on_stuck=on_stuck,
    )


def print_stacks_on_signal() -> None:
    faulthandler.register(STACKS_SIGNAL, file=sys.stderr, all_threads=True)


def build_tracing(config: ObservabilityConfig, service: str) -> Tracing | None:
    """None unless --enable-trace asks for it."""
    if not config.enable_trace:
        return None
    return open_tracing(config.otlp_traces_endpoint, service=service, version=version("sapwood"))


async def run_while_watched(config: ObservabilityConfig, services: Services) -> None:
    """Keep the engine's figures up to date and watch this event loop, until cancelled."""

    def last_words(reason: str) -> None:
        services.observer.write_crash_dump(reason)

    watchdog = build_watchdog(config, "the API process", last_words)
    watchdog.beat("running its event loop")
    watchdog.start()
    assert services.figures is not None, "build_services makes them"
    figures = asyncio.create_task(services.figures.run())
    try:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            watchdog.beat("running its event loop")
            if figures.done():
                figures.result()
    finally:
        figures.cancel()
        await asyncio.gather(figures, return_exceptions=True)
        # In a thread: the last spans may take seconds to send.
        await asyncio.to_thread(services.observer.close)
        await asyncio.to_thread(watchdog.stop)
