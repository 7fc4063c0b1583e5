"""/v1/responses and /v1/conversations with a history at the gateway."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from sapwood.gateway import kept
from sapwood.history.interface import HistoryUnavailable
from sapwood.history.sqlite import SqliteHistory
from tests.gateway.responders import Responder, texts
from tests.gateway.stubs import Bench, Running, Stub, bench

CONVERSATION = "conv_" + "0" * 32


@asynccontextmanager
async def serving(
    *stubs: Stub, path: Path | None = None, **options: Any
) -> AsyncIterator[tuple[Bench, openai.AsyncOpenAI]]:
    history = SqliteHistory(path, retention_days=1.0)
    try:
        async with (
            bench(*stubs, history=history, **options) as made,
            httpx.AsyncClient(trust_env=False) as plain,
            openai.AsyncOpenAI(
                base_url=f"{made.url}/v1", api_key="k", max_retries=0, http_client=plain
            ) as client,
        ):
            yield made, client
    finally:
        history.close()


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_any_worker_goes_on_from_a_response(is_stream: bool, end: bytes) -> None:
    async def run() -> None:
        stubs = Responder("a"), Responder("b")
        for stub in stubs:
            stub.end = end
        async with serving(*stubs) as (_, client):

            async def respond(**fields: Any) -> Any:
                if not is_stream:
                    return await client.responses.create(model="m", **fields)
                shown = []
                async for event in await client.responses.create(model="m", stream=True, **fields):
                    if hasattr(event, "response"):
                        shown.append(event.response)
                assert len({response.id for response in shown}) == 1
                previous = {response.previous_response_id for response in shown}
                assert previous == {fields.get("previous_response_id")}
                return shown[-1]

            first = await respond(input="1")
            again = [{"role": "user", "content": "2"}]
            second = await respond(input=again, previous_response_id=first.id)
            third = await respond(input="3", previous_response_id=second.id)
            assert second.output_text == "u:1|a:u:1|u:2"
            assert third.output_text == f"u:1|a:u:1|u:2|a:{second.output_text}|u:3"
            # In turns, so the second worker had never heard of the first response.
            asked = [stub.posts for stub in stubs]
            assert [len(posts) for posts in asked] == [2, 1]
            sent = json.loads(asked[1][0].body)
            assert sent["store"] is False
            assert not {"previous_response_id", "conversation"} & set(sent)
            # A user's items bring no id: a service that keeps items would look for it.
            assert ["id" in item for item in sent["input"]] == [False, True, False]
            stored = await client.responses.retrieve(third.id)
            assert stored.to_dict() == third.to_dict()
            assert stored.previous_response_id == second.id
            assert stored.to_dict()["store"] is True
            items = await client.responses.input_items.list(third.id, order="asc")
            assert len(items.data) == 5

    asyncio.run(run())


def test_a_response_that_no_one_has() -> None:
    async def run() -> None:
        async with serving(stub := Responder()) as (_, client):
            made = await client.responses.create(model="m", input="1")
            await client.responses.delete(made.id)
            stub.behaviour = 404
            for id_ in (made.id, "resp_x"):
                with pytest.raises(openai.NotFoundError, match="no worker has a response"):
                    await client.responses.retrieve(id_)
                with pytest.raises(openai.NotFoundError):
                    await client.responses.create(model="m", input="2", previous_response_id=id_)

    asyncio.run(run())


def test_what_only_a_worker_has_is_found_there() -> None:
    async def run() -> None:
        one, other = Stub("one"), Stub("other")
        one.behaviour = 404
        async with serving(one, other) as (made, _):
            got = await made.client.get("/v1/responses/resp_1?x=y")
            assert got.json()["worker"] == "other"
            posted = await made.post("/v1/responses", previous_response_id="resp_1", input="x")
            assert posted.json()["worker"] == "other"
            for method, path in (("POST", "/cancel"), ("GET", "/input_items"), ("DELETE", "")):
                told = await made.client.request(method, f"/v1/responses/resp_1{path}")
                assert told.json()["worker"] == "other"

    asyncio.run(run())


@pytest.mark.parametrize("fields", [{"store": False}, {"background": True}])
def test_what_the_gateway_does_not_keep(fields: dict[str, Any]) -> None:
    async def run() -> None:
        async with serving(stub := Responder()) as (made, client):
            body = {"model": "m", "input": "1"} | fields
            told = (await made.client.post("/v1/responses", json=body)).json()
            assert told["id"] == "resp_of_worker"
            assert json.loads(stub.posts[0].body) == body
            first = await client.responses.create(model="m", input="1")
            await made.post("/v1/responses", input="2", previous_response_id=first.id, **fields)
            assert texts(stub.posts[-1].body) == ["u:1", "a:u:1", "u:2"]

    asyncio.run(run())


def test_a_conversation_grows_by_its_responses() -> None:
    async def run() -> None:
        async with serving(Responder("a"), Responder("b")) as (_, client):
            greeting = {"type": "message", "role": "system", "content": "0"}
            made = await client.conversations.create(items=[greeting], metadata={"a": "b"})
            await client.responses.create(model="m", input="1", conversation=made.id)
            said = await client.responses.create(model="m", input="2", conversation={"id": made.id})
            assert said.output_text == "s:0|u:1|a:s:0|u:1|u:2"
            assert said.conversation is not None
            assert said.conversation.id == made.id
            items = await client.conversations.items.list(made.id, order="asc", limit=2)
            found = [item async for item in items]
            assert [item.role for item in found] == [
                "system",
                "user",
                "assistant",
                "user",
                "assistant",
            ]
            one = await client.conversations.items.retrieve(found[2].id, conversation_id=made.id)
            assert one == found[2]
            await client.conversations.items.delete(found[2].id, conversation_id=made.id)
            added = await client.conversations.items.create(made.id, items=[greeting])
            assert len(added.data) == 1
            newest = await client.conversations.items.list(made.id)
            assert newest.data[0].id == added.data[0].id
            changed = await client.conversations.update(made.id, metadata={"c": "d"})
            assert (await client.conversations.retrieve(made.id)) == changed
            with pytest.raises(openai.BadRequestError, match="send conversation instead"):
                await client.responses.create(model="m", input="3", previous_response_id=said.id)
            assert (await client.conversations.delete(made.id)).deleted
            with pytest.raises(openai.NotFoundError, match="no conversation"):
                await client.responses.create(model="m", input="3", conversation=made.id)

    asyncio.run(run())


WRONG = (
    ("/v1/responses", {"input": 1}, "must be a text or a list"),
    ("/v1/responses", {"input": [1]}, "must be an object"),
    ("/v1/responses", {"input": [{"type": [1]}]}, "must be a text"),
    ("/v1/responses", {"input": [{"type": 1}]}, "must be a text"),
    ("/v1/responses", {"previous_response_id": 1}, "must be a response's id"),
    ("/v1/responses", {"conversation": 1}, "must be a conversation's id"),
    ("/v1/responses", {"conversation": "x", "input": "1"}, "no conversation"),
    ("/v1/responses", {"conversation": CONVERSATION, "store": False}, "leave store out"),
    ("/v1/responses", {"conversation": CONVERSATION, "background": True}, "leave background out"),
    ("/v1/responses", {"conversation": CONVERSATION, "previous_response_id": "x"}, "only one"),
    ("/v1/conversations", {"items": {}}, "must be a list"),
    ("/v1/conversations", {"items": [{}] * 21}, "at most 20 items"),
    ("/v1/conversations", {"metadata": {"a": 1}}, "metadata must be"),
    ("/v1/conversations", {"metadata": {"a": "x" * 513}}, "metadata must be"),
    ("/v1/conversations", {"other": 1}, "unknown field"),
    ("/v1/conversations/%00", {}, "no conversation"),
    (f"/v1/conversations/{CONVERSATION}/items", {}, "items is required"),
    (f"/v1/conversations/{CONVERSATION}/items", {"items": [{}]}, "no conversation"),
)


def test_requests_that_cannot_be_meant() -> None:
    async def run() -> None:
        async with serving(stub := Responder()) as (made, _):
            for path, body, message in WRONG:
                told = await made.client.post(path, json=body)
                assert told.status_code in (400, 404), (path, body)
                assert message in told.json()["error"]["message"], (path, body)
            assert stub.posts == []
            told = await made.client.get(f"/v1/conversations/{CONVERSATION}/items/%00")
            assert told.status_code == 404
            told = await made.client.get(f"/v1/conversations/{CONVERSATION}/items?limit=1000")
            assert told.status_code == 400

    asyncio.run(run())


def test_a_conversation_that_is_too_long() -> None:
    async def run() -> None:
        async with serving(stub := Responder(), max_request_bytes=3000) as (_, client):
            first = await client.responses.create(model="m", input="x" * 1600)
            with pytest.raises(openai.BadRequestError, match="more than 3000 bytes"):
                await client.responses.create(model="m", input="2", previous_response_id=first.id)
            assert len(stub.posts) == 1

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_has_not_ended_is_not_kept(is_stream: bool) -> None:
    async def run() -> None:
        async with serving(stub := Responder(), disable_retries=True) as (made, _):
            stub.behaviour = "cut" if is_stream else 500
            told = await made.post("/v1/responses", input="1", stream=is_stream)
            assert told.status_code == (200 if is_stream else 500)
            assert ("broke off" in told.text) == is_stream
            stub.behaviour = "ok"
            made_ = await made.client.post("/v1/conversations", json={})
            id_ = made_.json()["id"]
            stub.status = "failed"
            await made.post("/v1/responses", input="1", stream=is_stream, conversation=id_)
            items = (await made.client.get(f"/v1/conversations/{id_}/items")).json()
            assert items["data"] == []

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("problem", ["store", "size", "shape"])
def test_an_answer_that_cannot_be_kept_is_an_error(
    is_stream: bool, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise HistoryUnavailable("the store does not answer")

    if problem == "size":
        monkeypatch.setattr(kept, "MAX_BYTES", 300)
    events = {"size": b"data: " + b"x" * 400, "shape": b'data: {"type": "response.completed"\n\n'}
    if problem in events:
        monkeypatch.setattr(Responder, "events", lambda *_: [events[problem]])

    async def run() -> None:
        async with serving(stub := Responder(), disable_retries=True) as (made, _):
            if problem == "size" and is_stream:
                stub.behaviour = "wait"  # the event never ends
            if problem == "store":
                monkeypatch.setattr(SqliteHistory, "add", fail)
            elif problem == "shape":
                stub.status = "strange"
            told = await made.post("/v1/responses", input="1" * 400, stream=is_stream)
            if is_stream:
                assert told.text.endswith("\n\n")
                last = told.text.rstrip().splitlines()[-1].removeprefix("data: ")
                assert json.loads(last)["type"] == "error"
            else:
                assert told.status_code == (503 if problem == "store" else 502)
            while made.num_open():
                await asyncio.sleep(0.005)

    asyncio.run(run())


def test_the_history_is_there_after_the_gateway_was_killed(tmp_path: Path) -> None:
    """Two gateways, as processes; the first one is killed."""

    async def run() -> None:
        async with Running(stub := Responder()) as engine:
            args = (engine.url, "--port", "0", "--prometheus-port", "-1")
            args += ("--state-dir", str(tmp_path), "--worker-startup-check-interval", "0.05")
            ids = {}
            for attempt in range(2):
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "sapwood", "gateway", *args, stderr=PIPE
                )
                try:
                    assert process.stderr is not None
                    url = ""
                    while not url:
                        line = (await process.stderr.readline()).decode()
                        assert line, "the gateway has ended"
                        if found := re.search(r"the gateway is at (\S+);", line):
                            url = found[1]
                    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
                        while (await client.get("/readiness")).status_code != 200:
                            await asyncio.sleep(0.02)
                        if attempt == 0:
                            told = await client.post("/v1/conversations", json={})
                            ids["conversation"] = told.json()["id"]
                        body = {"input": str(attempt), **ids}
                        told = await client.post("/v1/responses", json=body)
                        assert told.status_code == 200, told.text
                finally:
                    process.kill()
                    await process.wait()
            assert texts(stub.posts[-1].body) == ["u:0", "a:u:0", "u:1"]

    asyncio.run(run())


def test_without_a_history_there_are_no_conversations() -> None:
    async def run() -> None:
        async with bench(Stub("a")) as made:
            told = await made.client.post("/v1/conversations", json={})
            assert told.status_code == 400
            assert "--history-backend" in told.json()["error"]["message"]

    asyncio.run(run())
