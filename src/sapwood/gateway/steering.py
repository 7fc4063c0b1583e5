"""Endpoints that the gateway answers itself: its workers, its health, and what concerns all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import EngineUnavailable, InvalidRequest, NotFound
from sapwood.gateway.client import WorkerFailure
from sapwood.gateway.fleet import Fleet, spec_of
from sapwood.gateway.own_requests import JSON_BODY, ask
from sapwood.gateway.worker import Worker, WorkerState
from sapwood.http.body import read_bytes, read_json
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import json_response
from sapwood.observe.metrics import CONTENT_TYPE

ASK_ALL_TIMEOUT_S = 10.0


def steering_dialect(fleet: Fleet) -> Dialect:
    dialect = Dialect("gateway")
    _add_workers(dialect, fleet)
    _add_health(dialect, fleet)
    _add_models(dialect, fleet)
    _add_asked_of_all(dialect, fleet)
    return dialect


def _add_workers(dialect: Dialect, fleet: Fleet) -> None:
    @dialect.serves(_admin("/workers", "POST"))
    async def add_worker(request: Request) -> Response:
        worker = fleet.add(spec_of(await read_json(request)))
        return _accepted(worker, "the worker gets requests once it is healthy")

    @dialect.serves(_admin("/workers", "GET"))
    async def list_workers(request: Request) -> Response:
        workers = [described(worker, fleet) for worker in fleet]
        states = [worker.state for worker in fleet]
        stats = {state.value: states.count(state) for state in WorkerState}
        return json_response({"workers": workers, "total": len(workers), "stats": stats})

    @dialect.serves(_admin("/workers/{worker_id}", "GET"))
    async def get_worker(request: Request) -> Response:
        return json_response(described(fleet.find(request.path_params["worker_id"]), fleet))

    @dialect.serves(_admin("/workers/{worker_id}", "PUT"))
    async def change_worker(request: Request) -> Response:
        id_ = request.path_params["worker_id"]
        return _accepted(fleet.update(id_, await read_json(request)), "the worker is changed")

    @dialect.serves(_admin("/workers/{worker_id}", "DELETE"))
    async def remove_worker(request: Request) -> Response:
        worker = fleet.remove(request.path_params["worker_id"])
        return _accepted(worker, "the worker is removed when its open requests have ended")


def _add_health(dialect: Dialect, fleet: Fleet) -> None:
    def health() -> Response:
        num_ready = sum(worker.state is WorkerState.READY for worker in fleet)
        told = {"status": fleet.readiness, "ready_workers": num_ready}
        return json_response(told, 200 if fleet.is_ready else 503)

    @dialect.serves(_open("/liveness"))
    async def liveness(request: Request) -> Response:
        return json_response({"status": "ok"})

    @dialect.serves(_open("/health"))
    async def get_health(request: Request) -> Response:
        return health()

    @dialect.serves(_open("/readiness"))
    async def readiness(request: Request) -> Response:
        return health()

    @dialect.serves(_open("/ping"))
    async def ping(request: Request) -> Response:
        return health()


def _add_models(dialect: Dialect, fleet: Fleet) -> None:
    def cards() -> dict[str, dict[str, Any]]:
        ready = (worker for worker in fleet if worker.state is WorkerState.READY)
        return {card["id"]: card for worker in ready for card in worker.cards}

    @dialect.serves(_user("/v1/models"))
    async def list_models(request: Request) -> Response:
        return json_response({"object": "list", "data": list(cards().values())})

    @dialect.serves(_user("/v1/models/{model:path}"))
    async def get_model(request: Request) -> Response:
        name = request.path_params["model"]
        card = cards().get(name)
        if card is None:
            raise NotFound(f"no worker serves the model {name[:200]!r}; see /v1/models")
        return json_response(card)


def _add_asked_of_all(dialect: Dialect, fleet: Fleet) -> None:
    @dialect.serves(_admin("/flush_cache", "POST"))
    async def flush_cache(request: Request) -> Response:
        answers = await _ask_all(fleet, "POST", "/flush_cache")
        for worker in fleet:
            fleet.forget(worker)
        return _all_told(answers)

    @dialect.serves(_admin("/abort_request", "POST"))
    async def abort_request(request: Request) -> Response:
        return _all_told(await _ask_all(fleet, "POST", "/abort_request", await read_bytes(request)))

    @dialect.serves(_admin("/get_loads", "GET"))
    async def get_loads(request: Request) -> Response:
        answers = await _ask_all(fleet, "GET", "/v1/loads")
        told = [
            {
                "worker": worker.url,
                "open_requests": worker.num_open,
                "told": _json(answer[1]) if isinstance(answer, tuple) else None,
            }
            for worker, answer in answers
        ]
        return json_response({"workers": told})

    @dialect.serves(_open("/engine_metrics"))
    async def engine_metrics(request: Request) -> Response:
        answers = await _ask_all(fleet, "GET", "/metrics")
        texts = [
            (worker.url, answer[1].decode("utf-8", "replace"))
            for worker, answer in answers
            if isinstance(answer, tuple) and answer[0] == 200
        ]
        if not texts:
            raise EngineUnavailable("no worker shows metrics; start it with --enable-metrics")
        return Response(joined_metrics(texts), media_type=CONTENT_TYPE)


Answers = list[tuple[Worker, tuple[int, bytes] | WorkerFailure]]


async def _ask_all(fleet: Fleet, method: str, path: str, body: bytes = b"") -> Answers:
    """What each ready worker that is an engine answers."""
    workers = [
        worker
        for worker in fleet
        if worker.state is WorkerState.READY and worker.spec.runtime != "external"
    ]
    headers = JSON_BODY if body else ()

    async def told(worker: Worker) -> tuple[int, bytes] | WorkerFailure:
        try:
            return await ask(
                worker, method, path, body=body, headers=headers, timeout_s=ASK_ALL_TIMEOUT_S
            )
        except WorkerFailure as error:
            return error

    answers = await asyncio.gather(*(told(worker) for worker in workers))
    return list(zip(workers, answers, strict=True))


def _all_told(answers: Answers) -> Response:
    """200 if all workers have done what they were told; else 502, and which ones have not."""
    failed = {
        worker.url: str(answer) if isinstance(answer, WorkerFailure) else f"status {answer[0]}"
        for worker, answer in answers
        if isinstance(answer, WorkerFailure) or answer[0] >= 400
    }
    done = [worker.url for worker, _ in answers if worker.url not in failed]
    return json_response({"done": done, "failed": failed}, 502 if failed else 200)


def _accepted(worker: Worker, message: str) -> Response:
    location = f"/workers/{worker.id}"
    told = {
        "status": "accepted",
        "worker_id": worker.id,
        "url": worker.url,
        "location": location,
        "message": message,
    }
    return json_response(told, 202, {"location": location})


def described(worker: Worker, fleet: Fleet) -> dict[str, Any]:
    """The worker as GET /workers shows it."""
    told: dict[str, Any] = msgspec.to_builtins(worker.spec)
    del told["api_key"]  # a secret
    return told | {
        "id": worker.id,
        "url": worker.url,
        "status": worker.state.value,
        "is_healthy": worker.state is WorkerState.READY,
        "circuit_breaker": worker.breaker.state(fleet.clock()).name.lower(),
        "models": sorted(worker.models),
        "load": worker.num_open,
        "num_requests": worker.num_requests,
        "has_api_key": worker.spec.api_key is not None,
        "last_error": worker.last_error,
    }


def joined_metrics(texts: Sequence[tuple[str, str]]) -> bytes:
    """Metrics of several workers in one text; each series gets the label `worker`.

    texts  (a worker's address, its metrics); InvalidRequest if they are not in Prometheus's format
    """
    families: dict[tuple[str, str], Metric] = {}
    for url, text in texts:
        try:
            for family in text_string_to_metric_families(text):
                known = families.setdefault((family.name, family.type), family)
                for sample in family.samples if known is family else list(family.samples):
                    sample.labels["worker"] = url
                if known is not family:
                    known.samples.extend(family.samples)
        except (ValueError, KeyError, IndexError) as error:
            raise InvalidRequest(f"the metrics of {url} cannot be read: {error}") from error

    class _Joined(Collector):
        def collect(self) -> list[Metric]:
            return list(families.values())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Joined())
    return generate_latest(registry)


def _json(body: bytes) -> object:
    try:
        told: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return told


def _admin(path: str, method: str) -> Endpoint:
    return Endpoint(paths=(path,), methods=(method,), access="admin", is_documented=False)


def _open(path: str) -> Endpoint:
    return Endpoint(paths=(path,), methods=("GET",), access="open", is_documented=False)


def _user(path: str) -> Endpoint:
    return Endpoint(paths=(path,), methods=("GET",), access="user", is_documented=False)
