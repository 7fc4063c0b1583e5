"""Finds where workers publish KV events, and has those followed that are ready."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

import orjson

from sapwood.base.errors import ConfigError
from sapwood.gateway.client import WorkerFailure
from sapwood.gateway.own_requests import get
from sapwood.gateway.policies.known_pages import KnownPages
from sapwood.gateway.worker import Worker, WorkerState
from sapwood.schema.kv_events import KVEventsConfig, of_rank

log = logging.getLogger(__name__)

ENDPOINT_LABEL = "kv_events_endpoint"
REPLAY_LABEL = "kv_events_replay_endpoint"
MAX_CACHES = 64
INFO_LIMIT_S = 10.0

Endpoints = list[tuple[str, str | None]]
"""Of each of a worker's caches: where its events come from, and where they are sent again."""


class Follower(Protocol):
    """See `kv_follower.KVFollower`; a class of its own, since that needs pyzmq."""

    known: KnownPages

    @property
    def counts(self) -> tuple[int, int]: ...
    def follow_endpoints(self, worker_id: str, endpoints: Endpoints) -> None: ...
    def leave(self, worker_id: str) -> None: ...
    def close(self) -> None: ...


class KVWatch:
    """Told of each worker whose state has changed."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def changed(self, worker: Worker) -> None:
        task = self._tasks.pop(worker.id, None)
        if task is not None:
            task.cancel()
        if worker.state is not WorkerState.READY:
            self.follower.leave(worker.id)
            return
        task = asyncio.get_running_loop().create_task(self._begin(worker))
        self._tasks[worker.id] = task

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.follower.close()

    async def _begin(self, worker: Worker) -> None:
        try:
            endpoints = labelled(worker.spec.labels)
            if endpoints is None:
                status, body = await get(worker, "/server_info", INFO_LIMIT_S)
                endpoints = told(body, worker.origin.host) if status == 200 else []
        except (ConfigError, WorkerFailure) as error:
            log.warning("worker %s: its KV events cannot be followed: %s", worker.url, error)
            return
        if endpoints:
            log.info("worker %s: following KV events at %s", worker.url, endpoints[0][0])
            self.follower.follow_endpoints(worker.id, endpoints)
        else:
            log.info("worker %s publishes no KV events; the prompts it was sent count", worker.url)


def labelled(labels: Mapping[str, str]) -> Endpoints | None:
    """What a worker's labels say; None: nothing. ConfigError if they make no sense."""
    events, replays = (_words(labels.get(name, "")) for name in (ENDPOINT_LABEL, REPLAY_LABEL))
    if not events and not replays:
        return None
    if replays and len(replays) != len(events):
        raise ConfigError(
            f"the labels {ENDPOINT_LABEL} and {REPLAY_LABEL} name {len(events)} and {len(replays)} "
            "endpoints; name one for each cache in both"
        )
    if len(events) > MAX_CACHES:
        raise ConfigError(f"the label {ENDPOINT_LABEL} names more than {MAX_CACHES} endpoints")
    for endpoint in (*events, *replays):
        of_rank(endpoint, 0)
    if not replays:
        return [(endpoint, None) for endpoint in events]
    return list(zip(events, replays, strict=True))


def told(server_info: bytes, host: str) -> Endpoints:
    """What an engine's /server_info says; []: it publishes nothing. ConfigError if it cannot be
    reached there."""
    try:
        info = orjson.loads(server_info)
        assert isinstance(info, dict)
    except (orjson.JSONDecodeError, AssertionError):
        return []
    config = info.get("kv_events_config")
    if not isinstance(config, str):
        return []
    events = KVEventsConfig.parse(config)
    num_caches = info.get("dp_size")
    if not isinstance(num_caches, int) or not 1 <= num_caches <= MAX_CACHES:
        num_caches = 1
    if not events.is_on:
        return []
    return [
        (
            _reached(of_rank(events.endpoint, rank), host),
            None
            if events.replay_endpoint is None
            else _reached(of_rank(events.replay_endpoint, rank), host),
        )
        for rank in range(num_caches)
    ]


def _reached(endpoint: str, host: str) -> str:
    """An endpoint as the gateway connects it: instead of "all addresses" the worker's own."""
    scheme, _, rest = endpoint.partition("://")
    if scheme != "tcp":
        return endpoint
    given, _, port = rest.rpartition(":")
    if given in ("*", "0.0.0.0", "::", "[::]"):
        given = f"[{host}]" if ":" in host else host
    return f"tcp://{given}:{port}"


def _words(text: str) -> Sequence[str]:
    return text.replace(",", " ").split()
