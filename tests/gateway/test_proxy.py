"""A request's way through the gateway, over real sockets."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from sapwood.schema.limits import ROUTING_KEY
from tests.gateway.stubs import Stub, bench


def test_a_request_and_its_answer_are_passed_on_as_they_are() -> None:
    async def run() -> None:
        async with bench(stub := Stub("a")) as made:
            body = b'{"model": "m",  "prompt": "\\u00e9" }'
            answer = await made.client.post(
                "/v1/completions?a=%2F&b",
                content=body,
                headers={
                    "content-type": "application/json",
                    "x-own": "kept",
                    "x-request-id": "mine",
                    "connection": "x-secret, keep-alive",
                    "x-secret": "for the gateway",
                    "origin": made.url,
                    "authorization": "Bearer client",
                },
            )
            assert answer.status_code == 200
            assert answer.json() == {"worker": "a", "choices": []}
            assert answer.headers["x-stub"] == "yes"
            assert answer.headers["x-request-id"] == "mine"
            assert "access-control-allow-origin" not in answer.headers
            (asked,) = stub.posts
            assert asked.body == body
            assert asked.target == "/v1/completions?a=%2F&b"
            assert asked.headers["x-own"] == "kept"
            assert asked.headers["x-request-id"] == "mine"
            assert asked.headers["authorization"] == "Bearer client"
            assert asked.headers["x-forwarded-for"] == "127.0.0.1"
            assert asked.headers["host"] == stub.url.removeprefix("http://")
            assert not {"x-secret", "origin"} & set(asked.headers)
            assert made.num_open() == 0

    asyncio.run(run())


def test_each_request_gets_a_name_of_its_own() -> None:
    async def run() -> None:
        async with bench(Stub("a")) as made:
            names = {(await made.post()).headers["x-request-id"] for _ in range(3)}
            refused = await made.post(headers={"x-request-id": "a b"})
            assert len(names | {refused.headers["x-request-id"], "a b"}) == 5
            named = await made.post(headers={"x-correlation-id": "c"})
            assert named.headers["x-request-id"] == "c"

    asyncio.run(run())


def test_a_stream_is_passed_on_piece_by_piece() -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.behaviour = "wait"
        async with (
            bench(stub) as made,
            made.client.stream("POST", "/v1/completions", json={"stream": True}) as answer,
        ):
            pieces = answer.aiter_bytes()
            # The engine goes on only when its first event has come through.
            assert await anext(pieces) == b'data: {"worker": "a", "n": 0}\n\n'
            stub.go_on.set()
            rest = b"".join([piece async for piece in pieces])
            assert rest.endswith(b"data: [DONE]\n\n")
            assert b"smg_router_ttft_seconds_count 1.0" in made.gateway.metrics.exposition()
            assert made.num_open() == 0

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_ends_its_request_at_the_worker(is_stream: bool) -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.behaviour = "wait" if is_stream else "hang"
        async with bench(stub) as made:
            _, writer = reader, writer = await asyncio.open_connection(
                "127.0.0.1", int(made.url.rpartition(":")[2])
            )
            body = json.dumps({"stream": is_stream}).encode()
            head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
            writer.write(head % len(body) + body)
            if is_stream:
                assert b'"n": 0' in await reader.readuntil(b"0}")
            while not stub.posts:
                await asyncio.sleep(0.005)
            writer.close()
            while not stub.num_left or made.num_open():
                await asyncio.sleep(0.005)
            assert len(stub.posts) == 1
            # That says nothing about the worker.
            assert (await made.client.get("/workers")).json()["workers"][0][
                "circuit_breaker"
            ] == "closed"

    asyncio.run(run())


def test_a_long_answer_waits_for_a_slow_client() -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.behaviour = "large"
        async with (
            bench(stub) as made,
            made.client.stream("POST", "/generate", json={}) as answer,
        ):
            num_bytes = 0
            async for piece in answer.aiter_raw(8192):
                num_bytes += len(piece)
                await asyncio.sleep(0)
            assert num_bytes == 64 * 65536

    asyncio.run(run())


@pytest.mark.parametrize("status", [400, 401, 404, 422, 501])
def test_a_workers_refusal_is_passed_on_and_not_tried_again(status: int) -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.behaviour = status
        async with bench(stub) as made:
            answer = await made.post()
            assert answer.status_code == status
            assert answer.json() == {"error": {"message": "told to fail"}}
            assert len(stub.posts) == 1

    asyncio.run(run())


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_failed_request_goes_to_another_worker(status: int) -> None:
    async def run() -> None:
        bad, good = Stub("bad"), Stub("good")
        bad.behaviour = status
        async with bench(bad, good) as made:
            answers = [await made.post() for _ in range(6)]
            assert [answer.json()["worker"] for answer in answers] == ["good"] * 6
            assert len(bad.posts) >= 3
            assert len(good.posts) == 6

    asyncio.run(run())


def test_the_last_answer_is_passed_on_when_all_fail() -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.behaviour = 503
        async with bench(stub, retry_max_retries=2) as made:
            answer = await made.post()
            assert answer.status_code == 503
            assert answer.json() == {"error": {"message": "told to fail"}}
            assert len(stub.posts) == 3

    asyncio.run(run())


def test_retries_are_a_share_of_all_requests() -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.behaviour = 500
        options = {"retry_max_retries": 100, "retry_max_backoff_ms": 1.0}
        async with bench(stub, disable_circuit_breaker=True, **options) as made:
            for _ in range(3):
                await made.post()
            # 100 saved ones, and what these requests add.
            assert 102 <= len(stub.posts) <= 104

    asyncio.run(run())


def test_a_stream_that_breaks_off_between_events_ends_with_an_error() -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.behaviour = "cut"
        async with bench(stub) as made:
            text = (await made.post(stream=True)).text
            *_, last = [line for line in text.split("\n\n") if line]
            error = json.loads(last.removeprefix("data: "))["error"]
            assert error["code"] == 502
            assert "broke off" in error["message"]
            text = (await made.post("/v1/messages", stream=True)).text
            assert 'event: error\ndata: {"type":"error"' in text
            # Never sent again after its first byte.
            assert len(stub.posts) == 2
            assert made.num_open() == 0

    asyncio.run(run())


def test_an_answer_that_breaks_off_elsewhere_is_cut_off() -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.behaviour = "cut_event"
        async with bench(stub) as made:
            with pytest.raises(httpx.RemoteProtocolError):
                await made.post(stream=True)
            assert made.num_open() == 0

    asyncio.run(run())


def test_a_silent_stream_is_ended() -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.behaviour = "wait"
        async with bench(stub, stream_idle_timeout_secs=0.1) as made:
            text = (await made.post(stream=True)).text
            assert "nothing more came" in text
            while not stub.num_left:
                await asyncio.sleep(0.005)

    asyncio.run(run())


def test_a_request_that_takes_too_long_is_ended() -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.behaviour = "hang"
        async with bench(stub, request_timeout_secs=0.2) as made:
            answer = await made.post()
            assert answer.status_code == 504
            assert "--request-timeout-secs" in answer.json()["message"]
            while not stub.num_left:
                await asyncio.sleep(0.005)
            assert made.num_open() == 0

    asyncio.run(run())


def test_errors_are_spelled_as_the_engines_spell_them() -> None:
    async def run() -> None:
        async with bench(wait=False, disable_retries=True) as made:
            for path, read in (
                ("/v1/chat/completions", lambda told: told["message"]),
                ("/generate", lambda told: told["error"]["message"]),
                ("/v1/responses", lambda told: told["error"]["message"]),
                ("/v1/messages", lambda told: told["error"]["message"]),
                ("/api/chat", lambda told: told["error"]),
            ):
                answer = await made.post(path)
                assert answer.status_code == 503
                assert "has no workers" in read(answer.json())
            assert (await made.client.get("/nowhere")).status_code == 404
            wrong = await made.client.put("/generate")
            assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")

    asyncio.run(run())


def test_head_is_answered_as_get_without_its_body() -> None:
    """Review 2, number 11. A worker is asked with GET: the gateway would wait for HEAD's body."""

    async def run() -> None:
        async with bench(stub := Stub("a")) as made:
            for path in ("/health", "/v1/models", "/v1/responses/resp_1"):
                got, asked = await made.client.get(path), await made.client.head(path)
                assert (asked.status_code, asked.content) == (got.status_code, b"")
                assert asked.status_code != 405
            assert "HEAD" not in {asked.method for asked in stub.asked}
            assert made.num_open() == 0

    asyncio.run(run())


def test_bodies_have_a_limit() -> None:
    async def run() -> None:
        async with bench(stub := Stub("a"), max_request_bytes=100) as made:
            assert (await made.post(prompt="x" * 200)).status_code == 413
            assert (await made.post(prompt="x")).status_code == 200
            assert len(stub.posts) == 1

    asyncio.run(run())


def test_keys() -> None:
    async def run() -> None:
        options = {"api_key": "user", "admin_api_key": "admin", "worker_api_key": "worker"}
        async with bench(stub := Stub("a"), **options) as made:
            assert (await made.post()).status_code == 401
            assert (await made.client.get("/health")).status_code == 200
            user = {"authorization": "Bearer user"}
            assert (await made.post(headers=user)).status_code == 200
            assert stub.posts[0].headers["authorization"] == "Bearer worker"
            assert (await made.client.get("/workers", headers=user)).status_code == 403
            admin = {"x-api-key": "admin"}
            told = (await made.client.get("/workers", headers=admin)).text
            assert '"has_api_key":true' in told
            assert '"worker"' not in told

    asyncio.run(run())


def test_the_gateways_key_does_not_reach_the_workers() -> None:
    async def run() -> None:
        async with bench(stub := Stub("a"), api_key="user") as made:
            await made.post(headers={"x-api-key": "user"})
            assert not {"authorization", "x-api-key"} & set(stub.posts[0].headers)

    asyncio.run(run())


def test_a_routing_key_is_as_short_as_a_worker_takes_it() -> None:
    async def run() -> None:
        async with bench(stub := Stub("a")) as made:
            most = ROUTING_KEY.most
            taken = await made.post(headers={"x-smg-routing-key": "k" * most})
            refused = await made.post(headers={"x-smg-routing-key": "k" * (most + 1)})
            assert (taken.status_code, refused.status_code) == (200, 400)
            assert f"{most + 1} characters but at most {most}" in refused.text
            assert len(stub.posts) == 1

    asyncio.run(run())


def test_what_one_engine_keeps_is_refused_with_the_way_out() -> None:
    async def run() -> None:
        async with bench(stub := Stub("a")) as made:
            for path in ("/v1/files", "/v1/batches", "/v1/batches/batch_1/cancel"):
                refused = await made.post(path)
                assert refused.status_code == 400
                assert "the address of one engine" in refused.json()["message"]
            shown = await made.client.get("/v1/files/file-1/content")
            assert (shown.status_code, stub.asked) == (400, [])
            refused = await made.post("/v1/messages/batches")
            assert (refused.status_code, refused.json()["type"]) == (400, "error")

    asyncio.run(run())
