"""Workers that are found: the fleet follows the pods of a Kubernetes cluster that are ready."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import msgspec

from sapwood.base.errors import InvalidRequest, SapwoodError
from sapwood.gateway.fleet import Fleet
from sapwood.gateway.worker import WorkerSpec, WorkerState, WorkerType, worker_id

log = logging.getLogger(__name__)

BOOTSTRAP_PORT = "sglang.ai/bootstrap-port"
"""Annotation of pods that read prompts, as SGLang's gateway knows it."""
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0

Pod = Mapping[str, Any]
"""A pod as the API server spells it."""


class DiscoveryFailure(SapwoodError):
    """The cluster's API server gave no usable answer."""

    status = 503


class Pods(Protocol):
    """The pods of a cluster that have certain labels. Both methods raise DiscoveryFailure."""

    async def listed(self) -> tuple[list[Pod], str]:
        """All of them now, and the version of this list."""
        ...

    def changes(self, version: str) -> AsyncIterator[tuple[str, Pod]]:
        """What happens after that version: ("ADDED", "MODIFIED" or "DELETED", the pod). It ends
        after some time, when a list should be read again."""
        ...


class Discovery:
    """Adds a worker for each ready pod, and removes it when the pod is none any more.

    While the API server cannot be asked, the workers stay as they are. Workers that somebody else
    has added are left alone.

    kind  the type of these workers
    port  on which they listen
    """

    def __init__(
        self,
        fleet: Fleet,
        pods: Pods,
        *,
        kind: WorkerType,
        port: int,
        api_key: str | None = None,
    ) -> None:
        self._fleet = fleet
        self._pods = pods
        self._kind: WorkerType = kind
        self._port = port
        self._api_key = api_key
        self._found: dict[str, WorkerSpec] = {}
        self._added: set[str] = set()

    async def run(self) -> None:
        """Follow the pods until cancelled."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                pods, version = await self._pods.listed()
                self._found = {}
                for pod in pods:
                    self._see(pod)
                self._apply()
                async for change, pod in self._pods.changes(version):
                    pause_s = FIRST_PAUSE_S
                    self._see(pod, is_gone=change == "DELETED")
                    self._apply()
            except DiscoveryFailure as error:
                log.warning("pods cannot be followed now: %s", error.message)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)

    def _see(self, pod: Pod, *, is_gone: bool = False) -> None:
        if not isinstance(pod, Mapping):
            return  # an API server that talks nonsense
        uid = str(_mapping(pod, "metadata").get("uid"))
        spec = None if is_gone else spec_of_pod(pod, kind=self._kind, port=self._port)
        if spec is None:
            self._found.pop(uid, None)
        else:
            self._found[uid] = spec

    def _apply(self) -> None:
        wanted = {worker_id(spec.url): spec for spec in self._found.values()}
        known = {worker.id: worker for worker in self._fleet}
        for id_ in self._added - set(wanted):
            self._added.discard(id_)
            if id_ in known and known[id_].state is not WorkerState.DRAINING:
                log.info("worker %s is no ready pod any more", known[id_].url)
                self._fleet.remove(id_)
        for id_, spec in wanted.items():
            # One that drains is added again with the next list, if it is ready then.
            if id_ in known:
                continue
            try:
                self._fleet.add(_with_key(spec, self._api_key))
            except InvalidRequest as error:
                log.warning("a pod at %s is no worker: %s", spec.url, error.message)
                continue
            log.info("worker %s is found", spec.url)
            self._added.add(id_)


def spec_of_pod(pod: Pod, *, kind: WorkerType, port: int) -> WorkerSpec | None:
    """The worker in a pod; None if the pod is not ready."""
    metadata, status = _mapping(pod, "metadata"), _mapping(pod, "status")
    ip = status.get("podIP")
    conditions = status.get("conditions") or []
    is_ready = any(
        condition.get("type") == "Ready" and condition.get("status") == "True"
        for condition in conditions
        if isinstance(condition, Mapping)
    )
    if metadata.get("deletionTimestamp") or status.get("phase") != "Running":
        return None
    if not is_ready or not isinstance(ip, str):
        return None
    host = f"[{ip}]" if ":" in ip else ip
    told = _mapping(metadata, "annotations").get(BOOTSTRAP_PORT)
    labels = {"pod": str(metadata.get("name")), "namespace": str(metadata.get("namespace"))}
    return WorkerSpec(
        url=f"http://{host}:{port}",
        worker_type=kind,
        bootstrap_port=_port(told) if kind == "prefill" else None,
        runtime="sapwood" if kind == "regular" else "sglang",
        labels=labels,
    )


def _with_key(spec: WorkerSpec, api_key: str | None) -> WorkerSpec:
    return msgspec.structs.replace(spec, api_key=api_key)


def _mapping(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = value.get(name)
    return found if isinstance(found, Mapping) else {}


def _port(told: object) -> int | None:
    text = str(told)
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else None
