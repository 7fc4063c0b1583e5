"""Controls of a running server: profiles, logs, garbage collection, slower steps."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.observe.crash_dump import RequestDump
from sapwood.observe.profiling import ACTIVITIES, ProfileOrder, default_folder
from sapwood.schema.fields import Count, FieldTable, NotOffered, parse
from sapwood.schema.output import CallDone
from sapwood.schema.request import RecordExperts, StartProfile

MAX_SLEEP_S = 60.0
DEFAULT_THRESHOLD = 1000
"""Ended requests per file of /configure_logging's dump."""


class ProfileRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /start_profile.

    output_dir  default: sapwood-profiles in the system's folder for temporary files
    start_step  the engine's step at which the profile begins; default: at once
    num_steps   steps to record, per stage with profile_by_stage; default: until /stop_profile
    activities  "CPU", "GPU" or both, as far as there is a GPU; default: both
    """

    output_dir: str | None = None
    start_step: Count | None = None
    num_steps: Count | None = None
    activities: list[str] = []
    profile_by_stage: bool = False
    with_stack: bool = False
    record_shapes: bool = False
    profile_prefix: str = ""
    profile_id: str = ""


class LoggingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /configure_logging; absent fields change nothing. A folder of "" ends its dumps."""

    log_requests: bool | None = None
    log_requests_level: Count | None = None
    log_requests_format: Literal["text", "json"] | None = None
    dump_requests_folder: str | None = None
    dump_requests_threshold: Count | None = None
    crash_dump_folder: str | None = None


class SlowDownRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /slow_down: forward_sleep_time seconds pass before each step of the engine."""

    forward_sleep_time: float | None = None


_ONE_RANK = NotOffered(why="there is one rank")

PROFILE_FIELDS = FieldTable(
    title="POST /start_profile",
    shape=ProfileRequest,
    not_offered={
        "merge_profiles": _ONE_RANK,
        "profile_stages": NotOffered(why="a profile has all stages"),
    },
)
LOGGING_FIELDS = FieldTable(title="POST /configure_logging", shape=LoggingRequest)
SLOW_DOWN_FIELDS = FieldTable(title="POST /slow_down", shape=SlowDownRequest)


async def start_profile(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request, optional=True), PROFILE_FIELDS)
    return _answer(await begin_profile(asked, services))


async def begin_profile(asked: ProfileRequest, services: Services) -> CallDone:
    """InvalidRequest if it cannot be what is asked for."""
    name = "-".join(
        part for part in (asked.profile_prefix, asked.profile_id or _stamp(), "rank0") if part
    )
    if "/" in name or "\0" in name:
        raise InvalidRequest("profile_prefix must be no path", param="profile_prefix")
    folder = Path(asked.output_dir) if asked.output_dir else default_folder()
    # The order is checked here, where an error can still have its own status and field.
    order = ProfileOrder(
        folder=folder,
        name=name,
        start_step=asked.start_step,
        num_steps=asked.num_steps,
        activities=tuple(asked.activities) or ACTIVITIES,
        by_stage=asked.profile_by_stage,
        with_stack=asked.with_stack,
        record_shapes=asked.record_shapes,
    )
    return await services.engine.start_profile(
        StartProfile(
            call_id="",
            folder=str(order.folder),
            name=order.name,
            start_step=order.start_step,
            num_steps=order.num_steps,
            activities=tuple(order.activities),
            by_stage=order.by_stage,
            with_stack=order.with_stack,
            record_shapes=order.record_shapes,
        )
    )


async def stop_profile(services: Services) -> Response:
    return _answer(await services.engine.stop_profile())


async def record_experts(services: Services, action: Literal["start", "stop", "dump"]) -> Response:
    """Record which experts are chosen, or write that to a file; the answer names the file."""
    return _answer(await services.engine.record_experts(RecordExperts(call_id="", action=action)))


async def freeze_gc(services: Services) -> Response:
    """Exempt all objects that exist now from garbage collection, in both processes."""
    done = await services.engine.freeze_gc()
    gc.collect()
    gc.freeze()
    return _answer(done)


async def slow_down(request: Request, services: Services) -> Response:
    """Make every step longer, for tests of clients and gateways."""
    asked = parse(await read_json(request), SLOW_DOWN_FIELDS)
    sleep_s = asked.forward_sleep_time or 0.0
    if not 0 <= sleep_s <= MAX_SLEEP_S:
        raise InvalidRequest(
            f"forward_sleep_time is {sleep_s:g} but must be in [0, {MAX_SLEEP_S:g}] seconds",
            param="forward_sleep_time",
        )
    return _answer(await services.engine.slow_down(sleep_s))


async def configure_logging(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), LOGGING_FIELDS)
    observer = services.observer
    level = asked.log_requests_level
    if level is not None and level > 3:
        raise InvalidRequest(
            f"log_requests_level is {level} but must be from 0 to 3", param="log_requests_level"
        )
    threshold = asked.dump_requests_threshold
    if threshold == 0:
        raise InvalidRequest(
            "dump_requests_threshold must be at least 1", param="dump_requests_threshold"
        )
    if threshold is not None and asked.dump_requests_folder is None and observer.dump is None:
        raise InvalidRequest(
            "dump_requests_threshold needs a dump_requests_folder", param="dump_requests_folder"
        )
    if level is not None:
        observer.log.level = level
    if asked.log_requests is not None:
        observer.log.enabled = asked.log_requests
    if asked.log_requests_format is not None:
        observer.log.as_json = asked.log_requests_format == "json"
    if asked.crash_dump_folder is not None:
        folder = asked.crash_dump_folder
        observer.set_crash_dump_folder(Path(folder) if folder else None)
    _configure_dump(asked, services)
    dump = observer.dump
    return json_response(
        {
            "success": True,
            "log_requests": observer.log.enabled,
            "log_requests_level": observer.log.level,
            "log_requests_format": "json" if observer.log.as_json else "text",
            "dump_requests_folder": str(dump.folder) if dump is not None else "",
            "dump_requests_threshold": dump.threshold if dump is not None else None,
        }
    )


def _configure_dump(asked: LoggingRequest, services: Services) -> None:
    observer = services.observer
    threshold, folder = asked.dump_requests_threshold, asked.dump_requests_folder
    if folder is None:
        if threshold is not None and observer.dump is not None:
            observer.dump.threshold = threshold
        return
    if observer.dump is not None:
        observer.dump.flush()
    kept = observer.dump.threshold if observer.dump is not None else DEFAULT_THRESHOLD
    observer.dump = RequestDump(Path(folder), threshold or kept) if folder else None


def _answer(done: CallDone) -> Response:
    if not done.done:
        raise InvalidRequest(done.message)
    return json_response({"success": True, "message": done.message})


def _stamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S")
