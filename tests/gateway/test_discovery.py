"""Workers found in Kubernetes, by its own client against an API server that plays a record."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from starlette.types import Receive, Scope, Send

from sapwood.base.errors import ConfigError
from sapwood.gateway.discovery import spec_of_pod
from sapwood.gateway.worker import WorkerState
from sapwood.schema.config.gateway import GatewayConfig
from tests.gateway.stubs import Bench, Running, Stub, bench

pytest.importorskip("kubernetes")

from sapwood.app.gateway.discovery import found_workers


def pod(name: str, *, ip: str = "127.0.0.1", ready: bool = True, **metadata: Any) -> dict[str, Any]:
    """A pod as an API server tells of it, with most fields left out."""
    condition = {"type": "Ready", "status": "True" if ready else "False"}
    return {
        "metadata": {"name": name, "namespace": "default", "uid": f"uid-{name}", **metadata},
        "status": {"phase": "Running", "podIP": ip, "conditions": [condition]},
    }


class ApiServer:
    """An API server: lists by label selector, and events that a test adds.

    status  of its answers
    """

    def __init__(self) -> None:
        self.pods: dict[str, list[dict[str, Any]]] = {}
        self.events: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.status = 200
        self.paths: list[str] = []
        self.num_lists = 0

    def tell(self, change: str, told: dict[str, Any]) -> None:
        self.events.put_nowait(json.dumps({"type": change, "object": told}).encode() + b"\n")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        query = parse_qs(scope["query_string"].decode())
        headers = [(b"content-type", b"application/json")]
        start = {"type": "http.response.start", "status": self.status, "headers": headers}
        if "watch" not in query:
            self.paths.append(scope["path"])
            self.num_lists += 1
            items = self.pods.get(query["labelSelector"][0], [])
            body = json.dumps(
                {"kind": "PodList", "metadata": {"resourceVersion": "7"}, "items": items}
            )
            await send(start)
            await send({"type": "http.response.body", "body": body.encode()})
            return
        assert query["resourceVersion"] == ["7"]
        await send(start)
        while (event := await self.events.get()) is not None:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def cluster(
    server: ApiServer, folder: Path, port: int, **options: Any
) -> AsyncIterator[Bench]:
    """A gateway that follows the pods of `server`, which listen on `port`."""
    options = {"service_discovery": True, "service_discovery_port": port} | options
    async with Running(server) as api:
        file = folder / "kubeconfig"
        file.write_text(
            json.dumps(
                {
                    "current-context": "c",
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                    "clusters": [{"name": "c", "cluster": {"server": api.url}}],
                    "users": [{"name": "u", "user": {"token": "secret"}}],
                }
            )
        )
        async with bench(wait=False, **options) as made:
            config = GatewayConfig(port=0, **options)
            async with found_workers(config, made.gateway.fleet, {"KUBECONFIG": str(file)}):
                yield made
                server.events.put_nowait(None)


def test_the_fleet_follows_the_pods(tmp_path: Path) -> None:
    async def run() -> None:
        server, stub = ApiServer(), Stub("a")
        starting = pod("a", ready=False)
        server.pods["app=engine,tier=gpu"] = [starting, pod("b", ip="127.0.0.2", ready=False)]
        async with (
            Running(stub) as engine,
            cluster(server, tmp_path, engine.port, selector="app=engine tier=gpu") as made,
        ):
            stub.url = engine.url
            while not server.num_lists:
                await asyncio.sleep(0.005)
            assert server.paths == ["/api/v1/pods"]
            assert len(made.gateway.fleet) == 0
            server.tell("MODIFIED", pod("a"))
            while not len(made.gateway.fleet):
                await asyncio.sleep(0.005)
            await made.until(WorkerState.READY, stub)
            assert (await made.post()).json()["worker"] == "a"
            (listed,) = (await made.client.get("/workers")).json()["workers"]
            assert listed["labels"] == {"pod": "a", "namespace": "default"}
            server.tell("MODIFIED", pod("a", deletionTimestamp="2026-01-01T00:00:00Z"))
            while len(made.gateway.fleet):
                await asyncio.sleep(0.005)

    asyncio.run(run())


def test_workers_stay_while_the_api_server_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sapwood.gateway.discovery.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("sapwood.gateway.discovery.LONGEST_PAUSE_S", 0.01)

    async def run() -> None:
        server, stub = ApiServer(), Stub("a")
        server.pods["app=engine"] = [pod("a")]
        async with (
            Running(stub) as engine,
            cluster(
                server,
                tmp_path,
                engine.port,
                selector="app=engine",
                service_discovery_namespace="models",
            ) as made,
        ):
            stub.url = engine.url
            while not len(made.gateway.fleet):
                await asyncio.sleep(0.005)
            assert server.paths == ["/api/v1/namespaces/models/pods"]
            server.status = 500
            server.tell("ERROR", {"code": 410, "reason": "Expired", "message": "too old"})
            server.events.put_nowait(None)
            failed = server.num_lists
            while server.num_lists < failed + 3:
                await asyncio.sleep(0.005)
            assert len(made.gateway.fleet) == 1
            # What was missed meanwhile is in the next list.
            server.pods["app=engine"] = []
            server.status = 200
            while len(made.gateway.fleet):
                await asyncio.sleep(0.005)

    asyncio.run(run())


def test_pairs_are_found_by_two_selectors(tmp_path: Path) -> None:
    async def run() -> None:
        server = ApiServer()
        annotations = {"sglang.ai/bootstrap-port": "8998"}
        server.pods = {
            "role=prefill": [pod("p", annotations=annotations)],
            "role=decode": [pod("d", ip="127.0.0.2", annotations=annotations)],
        }
        async with cluster(
            server,
            tmp_path,
            9,
            pd_disaggregation=True,
            prefill_selector="role=prefill",
            decode_selector="role=decode",
        ) as made:
            while len(made.gateway.fleet) < 2:
                await asyncio.sleep(0.005)
            told = {
                (worker.spec.worker_type, worker.url, worker.spec.bootstrap_port)
                for worker in made.gateway.fleet
            }
            assert told == {
                ("prefill", "http://127.0.0.1:9", 8998),
                ("decode", "http://127.0.0.2:9", None),
            }
            server.events.put_nowait(None)  # one for each of the two that watch

    asyncio.run(run())


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"metadata": None, "status": None},
        pod("a", ready=False),
        pod("a", deletionTimestamp="2026-01-01T00:00:00Z"),
        {**pod("a"), "status": {**pod("a")["status"], "phase": "Pending"}},
        {**pod("a"), "status": {**pod("a")["status"], "podIP": None}},
        {**pod("a"), "status": {**pod("a")["status"], "conditions": [None]}},
    ],
)
def test_pods_that_are_not_ready_are_no_workers(told: dict[str, Any]) -> None:
    assert spec_of_pod(told, kind="regular", port=80) is None


def test_addresses_and_ports_of_pods() -> None:
    spec = spec_of_pod(pod("a", ip="fd00::1"), kind="regular", port=8000)
    assert spec is not None
    assert spec.url == "http://[fd00::1]:8000"
    spec.check()
    wrong = pod("a", annotations={"sglang.ai/bootstrap-port": "many"})
    found = spec_of_pod(wrong, kind="prefill", port=80)
    assert found is not None
    assert found.bootstrap_port is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"service_discovery": True}, "--selector"),
        ({"service_discovery": True, "selector": "app"}, "KEY=VALUE"),
        ({"service_discovery": True, "selector": "app=a=b"}, "KEY=VALUE"),
        ({"selector": "app=a"}, "--service-discovery"),
        ({"service_discovery": True, "prefill_selector": "a=b"}, "--pd-disaggregation"),
        (
            {"service_discovery": True, "pd_disaggregation": True, "selector": "a=b"},
            "--pd-disaggregation",
        ),
        (
            {"service_discovery": True, "selector": "a=b", "service_discovery_port": 0},
            "--service-discovery-port",
        ),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        GatewayConfig(**options)


def test_no_cluster_is_an_error(tmp_path: Path) -> None:
    async def run() -> None:
        config = GatewayConfig(port=0, service_discovery=True, selector="a=b")
        async with bench(wait=False) as made:
            env = {"KUBECONFIG": str(tmp_path / "missing")}
            with pytest.raises(ConfigError, match="no cluster"):
                async with found_workers(config, made.gateway.fleet, env):
                    pass

    asyncio.run(run())
