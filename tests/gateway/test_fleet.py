"""Workers that come, go, fail and recover, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from sapwood.gateway.worker import WorkerState
from sapwood.history.sqlite import SqliteHistory
from tests.gateway.stubs import Running, Stub, bench


def test_workers_are_added_changed_listed_and_removed() -> None:
    async def run() -> None:
        stub = Stub("late", models=["m", "n"])
        async with bench(Stub("first")) as made, Running(stub) as engine:
            stub.url = engine.url
            told = await made.client.post(
                "/workers", json={"url": engine.url, "labels": {"zone": "b"}, "api_key": "secret"}
            )
            assert told.status_code == 202
            assert told.headers["location"] == f"/workers/{told.json()['worker_id']}"
            place = told.headers["location"]
            await made.until(WorkerState.READY, stub)
            got = (await made.client.get(place)).json()
            assert got["status"] == "ready"
            assert got["models"] == ["m", "n"]
            assert got["labels"] == {"zone": "b"}
            assert "secret" not in str(got)
            listed = (await made.client.get("/workers")).json()
            assert (listed["total"], listed["stats"]["ready"]) == (2, 2)
            again = await made.client.post("/workers", json={"url": engine.url})
            assert again.status_code == 400
            assert "already" in again.json()["error"]["message"]
            changed = await made.client.put(place, json={"priority": 60})
            assert changed.status_code == 202
            workers = {(await made.post()).json()["worker"] for _ in range(4)}
            assert workers == {"late"}
            assert stub.posts[0].headers["authorization"] == "Bearer secret"
            assert (await made.client.delete(place)).status_code == 202
            while (await made.client.get(place)).status_code != 404:
                await asyncio.sleep(0.01)
            assert (await made.post()).json()["worker"] == "first"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "url"),
        ({"url": "nowhere"}, "url"),
        ({"url": "ftp://host"}, "url"),
        ({"url": "http://host:99999"}, "url"),
        ({"url": "http://user@host"}, "url"),
        ({"url": "http://host/?a=b"}, "url"),
        ({"url": "http://host\r\nx: y"}, "url"),
        ({"url": "http://h", "cost": 0}, "cost"),
        ({"url": "http://h", "health_failure_threshold": 0}, "health_failure_threshold"),
        ({"url": "http://h", "worker_type": "prefill"}, "prefill"),
        ({"url": "http://h", "bootstrap_port": 1}, "bootstrap_port"),
        ({"url": "http://h", "api_key": "é"}, "api_key"),
        ({"url": 7}, "str"),
    ],
)
def test_workers_that_cannot_be_meant_are_refused(body: dict[str, object], named: str) -> None:
    async def run() -> None:
        async with bench(wait=False) as made:
            told = await made.client.post("/workers", json=body)
            assert told.status_code == 400
            assert named in told.text
            assert len(made.gateway.fleet) == 0

    asyncio.run(run())


def test_what_a_worker_is_cannot_be_changed() -> None:
    async def run() -> None:
        async with bench(Stub("a")) as made:
            (worker,) = made.gateway.fleet
            place = f"/workers/{worker.id}"
            assert (await made.client.put(place, json={"url": "http://b"})).status_code == 400
            assert (await made.client.put(place, json={"cost": -1})).status_code == 400
            assert (await made.client.put("/workers/x", json={})).status_code == 404
            assert worker.spec.cost == 1

    asyncio.run(run())


def test_a_removed_worker_ends_its_open_requests() -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.behaviour = "wait"
        async with bench(stub) as made:
            worker = made.worker(stub)
            async with made.client.stream("POST", "/generate", json={"stream": True}) as answer:
                pieces = answer.aiter_bytes()
                await anext(pieces)
                await made.client.delete(f"/workers/{worker.id}")
                assert (await made.client.get("/workers")).json()["stats"]["draining"] == 1
                assert (await made.post()).status_code == 503
                stub.go_on.set()
                rest = b"".join([piece async for piece in pieces])
                assert rest.endswith(b"[DONE]\n\n")
            while len(made.gateway.fleet):
                await asyncio.sleep(0.005)

    asyncio.run(run())


def test_a_drain_has_an_end() -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.behaviour = "wait"
        async with bench(stub, drain_timeout=0.05) as made:
            posted = asyncio.create_task(made.post(stream=True))
            while not stub.posts:
                await asyncio.sleep(0.005)
            made.gateway.fleet.remove(made.worker(stub).id)
            assert "broke off" in (await posted).text
            assert len(made.gateway.fleet) == 0

    asyncio.run(run())


def test_an_engine_that_is_not_there_yet_is_awaited() -> None:
    async def run() -> None:
        async with Running(Stub("x")) as probe:
            port = probe.port
        stub = Stub("a")
        async with bench(wait=False, retry_max_retries=0) as made:
            url = stub.url = f"http://127.0.0.1:{port}"
            await made.client.post("/workers", json={"url": url})
            answer = await made.post()
            assert answer.status_code == 503
            assert "1 starting" in answer.json()["message"]
            assert (await made.client.get("/health")).status_code == 503
            async with Running(stub, port):
                await made.until(WorkerState.READY, stub)
                assert (await made.post()).status_code == 200
                assert (await made.client.get("/readiness")).status_code == 200

    asyncio.run(run())


def test_an_engine_that_never_comes_has_failed() -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.health = 503
        async with bench(stub, wait=False, worker_startup_timeout_secs=0.05) as made:
            await made.until(WorkerState.FAILED)
            assert "503" in str(made.worker(stub).last_error)
            assert (await made.client.get("/liveness")).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize("health", [500, "hang"])
def test_an_unhealthy_worker_gets_no_requests_until_it_recovers(health: str | int) -> None:
    async def run() -> None:
        bad, good = Stub("bad"), Stub("good")
        options = {"health_check_interval_secs": 0.02, "health_check_timeout_secs": 0.2}
        async with bench(bad, good, **options) as made:
            bad.health, bad.behaviour = health, "hang"
            # Whoever waits for its answer is sent elsewhere.
            answers = await asyncio.gather(*(made.post() for _ in range(6)))
            assert {answer.json()["worker"] for answer in answers} == {"good"}
            await made.until(WorkerState.UNHEALTHY, bad)
            assert (await made.client.get("/health")).json()["ready_workers"] == 1
            bad.health, bad.behaviour = 200, "ok"
            await made.until(WorkerState.READY, bad)
            workers = {(await made.post()).json()["worker"] for _ in range(4)}
            assert workers == {"bad", "good"}

    asyncio.run(run())


def test_a_breaker_opens_and_closes() -> None:
    async def run() -> None:
        bad, good = Stub("bad"), Stub("good")
        options = {"cb_failure_threshold": 2, "cb_success_threshold": 1}
        async with bench(bad, good, cb_timeout_duration_secs=0.3, **options) as made:
            bad.behaviour = 500
            while made.worker(bad).admits(made.gateway.fleet.clock()):
                assert (await made.post()).status_code == 200
            num_asked = len(bad.posts)
            assert num_asked == 2
            assert b'smg_worker_cb_state{worker="%s"} 1.0' % bad.url.encode() in (
                made.gateway.metrics.exposition()
            )
            bad.behaviour = "ok"
            workers = set()
            while "bad" not in workers:
                workers.add((await made.post()).json()["worker"])
                await asyncio.sleep(0.01)
            assert made.worker(bad).breaker.state(made.gateway.fleet.clock()).name == "CLOSED"

    asyncio.run(run())


def test_models_choose_workers() -> None:
    async def run() -> None:
        async with bench(Stub("a", models=["x", "s"]), Stub("b", models=["y", "s"])) as made:
            for model, worker in (("x", "a"), ("y", "b")):
                answers = [await made.post(model=model) for _ in range(4)]
                assert {answer.json()["worker"] for answer in answers} == {worker}
            assert len({(await made.post(model="s")).json()["worker"] for _ in range(4)}) == 2
            answer = await made.post(model="z")
            assert answer.status_code == 404
            assert "s, x, y" in answer.json()["message"]
            listed = (await made.client.get("/v1/models")).json()["data"]
            assert {card["id"] for card in listed} == {"x", "y", "s"}
            assert (await made.client.get("/v1/models/x")).json()["owned_by"] == "stub"
            assert (await made.client.get("/v1/models/z")).status_code == 404

    asyncio.run(run())


def test_an_external_worker_only_gets_openais_paths() -> None:
    async def run() -> None:
        stub = Stub("a")
        async with bench(wait=False, disable_retries=True) as made, Running(stub) as engine:
            stub.url = engine.url
            stub.health = 404
            await made.client.post("/workers", json={"url": engine.url, "runtime": "external"})
            await made.until(WorkerState.READY, stub)
            assert (await made.post("/v1/chat/completions")).status_code == 200
            assert (await made.post("/generate")).status_code == 503

    asyncio.run(run())


def test_requests_wait_for_their_turn_and_no_longer() -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.behaviour = "hang"
        options = {"max_concurrent_requests": 1, "queue_size": 1, "queue_timeout_secs": 0.2}
        async with bench(stub, **options) as made:
            first = asyncio.create_task(made.post())
            while not stub.posts:
                await asyncio.sleep(0.005)
            second = asyncio.create_task(made.post())
            while not made.gateway.gate.num_waiting:
                await asyncio.sleep(0.005)
            third = await made.post()
            assert third.status_code == 429
            assert third.headers["retry-after"] == "1"
            assert (await second).status_code == 408
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first
            while made.num_open():
                await asyncio.sleep(0.005)
            stub.behaviour = "ok"
            assert (await made.post()).status_code == 200

    asyncio.run(run())


def test_so_many_requests_per_second() -> None:
    async def run() -> None:
        async with bench(Stub("a"), rate_limit_tokens_per_second=20.0) as made:
            start_s = asyncio.get_running_loop().time()
            answers = await asyncio.gather(*(made.post() for _ in range(25)))
            assert {answer.status_code for answer in answers} == {200}
            # The first 20 at once, the others one by one.
            assert asyncio.get_running_loop().time() - start_s > 0.2

    asyncio.run(run())


def test_what_concerns_all_workers_is_asked_of_all() -> None:
    async def run() -> None:
        one, other = Stub("one"), Stub("other")
        async with bench(one, other) as made:
            told = await made.client.post("/flush_cache")
            assert told.json() == {"done": [one.url, other.url], "failed": {}}
            await made.client.post("/abort_request", json={"rid": "x"})
            for stub in (one, other):
                assert [asked.path for asked in stub.posts] == ["/flush_cache", "/abort_request"]
                assert stub.posts[1].body == b'{"rid":"x"}'
            other.behaviour = 500
            told = await made.client.post("/flush_cache")
            assert told.status_code == 502
            assert told.json() == {"done": [one.url], "failed": {other.url: "status 500"}}
            loads = (await made.client.get("/get_loads")).json()["workers"]
            assert [load["worker"] for load in loads] == [one.url, other.url]

    asyncio.run(run())


def test_a_stored_response_is_found_where_it_is() -> None:
    async def run() -> None:
        one, other = Stub("one"), Stub("other")
        one.behaviour = 404
        async with bench(one, other) as made:
            got = await made.client.get("/v1/responses/resp_1?x=y")
            assert got.json()["worker"] == "other"
            posted = await made.post("/v1/responses", previous_response_id="resp_1")
            assert posted.json()["worker"] == "other"
            assert (await made.client.post("/v1/responses/resp_1/cancel")).status_code == 200
            assert [asked.path for asked in one.posts] == []
            other.behaviour = 404
            assert (await made.client.get("/v1/responses/resp_1")).status_code == 404
            other.behaviour = 500
            assert (await made.client.get("/v1/responses/resp_1")).status_code == 503
            assert (await made.client.get("/v1/responses/a%0d%0ab")).status_code == 404

    asyncio.run(run())


@pytest.mark.parametrize("has_history", [False, True])
def test_a_picture_is_found_where_it_is(has_history: bool, tmp_path: Path) -> None:
    history = SqliteHistory(tmp_path / "history", retention_days=1.0) if has_history else None

    async def run() -> None:
        one, other = Stub("one"), Stub("other")
        one.behaviour = 404
        async with bench(one, other, history=history) as made:
            got = await made.client.get("/v1/images/img_1/content")
            assert got.json()["worker"] == "other"
            other.behaviour = 404
            missing = await made.client.get("/v1/images/img_1/content")
            assert missing.status_code == 404
            assert "picture" in missing.text

    asyncio.run(run())
    if history is not None:
        history.close()


def test_a_video_is_found_where_it_is_and_lists_are_joined() -> None:
    async def run() -> None:
        one, other = Stub("one"), Stub("other")
        one.behaviour = 404
        async with bench(one, other) as made:
            for path in ("/v1/videos/video_1", "/v1/videos/video_1/content"):
                got = await made.client.get(path)
                assert got.json()["worker"] == "other"
            assert (await made.client.post("/v1/videos/video_1/remix")).status_code == 200
            assert (await made.client.delete("/v1/videos/video_1")).status_code == 200
            other.behaviour = 404
            assert "video" in (await made.client.get("/v1/videos/video_1")).text
            # Workers that draw no videos have none to tell of.
            assert (await made.client.get("/v1/videos")).json()["data"] == []
            other.behaviour = 500
            assert (await made.client.get("/v1/videos")).status_code == 503

    asyncio.run(run())


def test_a_gateway_that_drains_takes_no_requests() -> None:
    async def run() -> None:
        async with bench(Stub("a")) as made:
            made.gateway.is_draining = True
            assert (await made.post()).status_code == 503
            assert (await made.client.get("/readiness")).status_code == 503
            assert (await made.client.get("/liveness")).status_code == 200

    asyncio.run(run())
