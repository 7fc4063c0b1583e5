"""Streamed responses whose tools the gateway calls, as the official client reads them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from sapwood.text.tokenizer import Tokenizer
from tests.gateway.mcp.test_responses import CAREFUL, TOOLS, Caller, Served, serving
from tests.gateway.plain.plain_stub import PlainStub, write_tokenizer
from tests.gateway.stubs import Asked

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
CALL_EVENTS = [
    "response.output_item.added",
    "response.mcp_call.in_progress",
    "response.mcp_call_arguments.delta",
    "response.mcp_call_arguments.done",
    "response.mcp_call.completed",
    "response.output_item.done",
]


class Streamer(Caller):
    """Streams what it says as OpenAI's API does, arguments in two pieces.

    is_terse   tells its items in the last event only
    num_asked  after so many requests it refuses
    """

    def __init__(self, *turns: Sequence[tuple[str, object]]) -> None:
        super().__init__(*turns)
        self.is_terse = False
        self.num_asked = 99

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/responses" and len(self.posts) >= self.num_asked:
            self.behaviour = 422
        await super().__call__(scope, receive, send)

    def answer(self, asked: Asked) -> dict[str, Any]:
        usage = {
            "input_tokens": 5,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 2,
            "output_tokens_details": {"reasoning_tokens": 1},
            "total_tokens": 7,
        }
        return {**super().answer(asked), "usage": usage}

    def events(self, asked: Asked) -> list[bytes]:
        answer = self.answer(asked)
        begun = {**answer, "status": "in_progress", "output": [], "usage": None}
        told: list[dict[str, Any]] = [
            {"type": "response.created", "response": begun},
            {"type": "response.in_progress", "response": begun},
        ]
        for index, item in enumerate([] if self.is_terse else answer["output"]):
            told += self._about(index, item)
        told.append({"type": "response.completed", "response": answer})
        return [self._encoded({**event, "sequence_number": n}) for n, event in enumerate(told)]

    def _about(self, index: int, item: dict[str, Any]) -> list[dict[str, Any]]:
        place = {"output_index": index, "item_id": item["id"]}
        item_done = {"type": "response.output_item.done", "output_index": index, "item": item}
        if item["type"] == "function_call":
            begun, text = {**item, "arguments": "", "status": "in_progress"}, item["arguments"]
            kind = "response.function_call_arguments"
            return [
                {"type": "response.output_item.added", "output_index": index, "item": begun},
                {"type": f"{kind}.delta", **place, "delta": text[:3]},
                {"type": f"{kind}.delta", **place, "delta": text[3:]},
                {"type": f"{kind}.done", **place, "name": item["name"], "arguments": text},
                item_done,
            ]
        begun = {**item, "content": [], "status": "in_progress"}
        place["content_index"], (part,) = 0, item["content"]
        kind = "response.output_text"
        return [
            {"type": "response.output_item.added", "output_index": index, "item": begun},
            {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
            {"type": f"{kind}.delta", **place, "delta": part["text"], "logprobs": []},
            {"type": f"{kind}.done", **place, "text": part["text"], "logprobs": []},
            {"type": "response.content_part.done", **place, "part": part},
            item_done,
        ]


def read(text: str) -> list[dict[str, Any]]:
    """The events, each one of the API's; their numbers follow each other, and items and their
    places are the same in all of them."""
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name for name, _ in blocks] == [f"event: {event['type']}" for event in events]
    for event in events:
        # The API has no word for this reason, and its client takes any.
        known = json.dumps(event).replace('"max_tool_calls"}', '"max_output_tokens"}')
        EVENTS.validate_json(known)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    added: dict[int, str] = {}
    done: dict[int, Any] = {}
    for event in events:
        place = event.get("output_index")
        if event["type"] == "response.output_item.added":
            assert place == len(added)
            added[place] = event["item"]["id"]
        elif place is not None:
            assert place not in done
            assert added[place] == (event.get("item_id") or event["item"]["id"])
        if event["type"] == "response.output_item.done":
            done[place] = event["item"]
    if events[-1]["type"] != "error":
        assert events[-1]["response"]["output"] == [done[place] for place in sorted(done)]
    return events


async def post(served: Served, **fields: Any) -> httpx.Response:
    body = {"model": "m", "input": "go", "tools": TOOLS, "stream": True} | fields
    return await served.bench.client.post("/v1/responses", json=body)


def types(events: Sequence[dict[str, Any]], place: int | None = None) -> list[str]:
    return [event["type"] for event in events if place in (None, event.get("output_index"))]


@pytest.mark.parametrize("is_terse", [False, True])
def test_the_events_of_several_turns(is_terse: bool, tmp_path: Path) -> None:
    async def run() -> None:
        calls = (
            [("add", {"a": 2, "b": 3}), ("take_note", {"text": "x"})],
            [("add", {"a": 1, "b": 1})],
        )
        stub = Streamer(*calls)
        stub.is_terse = is_terse
        async with serving(stub, tmp_path) as served:
            events = read((await post(served)).text)
            assert types(events)[:2] == ["response.created", "response.in_progress"]
            assert events[0]["response"]["tools"] == TOOLS
            assert types(events, 0) == [
                "response.output_item.added",
                "response.mcp_list_tools.in_progress",
                "response.mcp_list_tools.completed",
                "response.output_item.done",
            ]
            for place in (1, 2, 3):
                assert list(dict.fromkeys(types(events, place))) == CALL_EVENTS
                pieces = [
                    event.get("delta", "") for event in events if event.get("output_index") == place
                ]
                (whole,) = [
                    event["arguments"]
                    for event in events
                    if event["type"] == CALL_EVENTS[3] and event["output_index"] == place
                ]
                assert "".join(pieces) == whole
            shown = events[-1]["response"]
            assert events[-1]["type"] == "response.completed"
            assert [item["type"] for item in shown["output"]] == [
                "mcp_list_tools",
                *["mcp_call"] * 3,
                "message",
            ]
            assert [item["output"] for item in shown["output"][1:4]] == ["5", "noted x", "2"]
            assert shown["usage"]["input_tokens"] == 15
            assert {event["response"]["id"] for event in events if "response" in event} == {
                shown["id"]
            }
            # The history is as without a stream.
            kept = (await served.bench.client.get(f"/v1/responses/{shown['id']}")).json()
            assert kept == shown
            stub.turns = [list(turn) for turn in calls]
            plain = (await post(served, stream=False)).json()

            def alike(response: dict[str, Any]) -> list[Any]:
                items = [{**item, "id": ""} for item in response["output"]]
                return [items, response["usage"], response["status"], response["tools"]]

            assert alike(plain) == alike(shown)
            more = read((await post(served, previous_response_id=shown["id"], input="more")).text)
            assert types(more, 0)[0] == "response.output_item.added"
            assert "mcp_call" not in json.dumps(more[-1]["response"]["output"])
            assert "5|noted x|2" in json.dumps(stub.bodies[-1]["input"])
            # The official client puts the same together.
            stub.turns = [list(turn) for turn in calls]
            stream = await served.create(stream=True)
            seen = [event async for event in stream]
            assert seen[-1].response.output_text == shown["output"][-1]["content"][0]["text"]

    asyncio.run(run())


def test_texts_come_while_the_worker_generates(tmp_path: Path) -> None:
    async def run() -> None:
        stub = Streamer()
        stub.behaviour = "wait"
        async with serving(stub, tmp_path) as served:
            stream = await served.create(stream=True, store=False)
            seen = []
            async for event in stream:
                seen.append(event.type)
                if event.type == "response.mcp_list_tools.completed":
                    stub.go_on.set()
            assert seen[-1] == "response.completed"

    asyncio.run(run())


def test_approvals_are_asked_for_and_approved_calls_are_told_of(tmp_path: Path) -> None:
    async def run() -> None:
        stub = Streamer([("take_note", {"text": "x"})])
        async with serving(stub, tmp_path) as served:
            events = read((await post(served, tools=CAREFUL)).text)
            assert types(events, 1) == ["response.output_item.added", "response.output_item.done"]
            asked = events[-1]["response"]
            assert asked["output"][1]["type"] == "mcp_approval_request"
            assert served.seen.notes == []
            approval = {
                "type": "mcp_approval_response",
                "approval_request_id": asked["output"][1]["id"],
                "approve": True,
            }
            more = {"previous_response_id": asked["id"], "input": [approval]}
            events = read((await post(served, tools=CAREFUL, **more)).text)
            assert served.seen.notes == ["x"]
            assert types(events)[:2] == ["response.created", "response.in_progress"]
            assert types(events, 0) == CALL_EVENTS
            call = events[-1]["response"]["output"][0]
            assert call["approval_request_id"] == approval["approval_request_id"]

    asyncio.run(run())


def test_calls_that_fail_or_are_too_many(tmp_path: Path) -> None:
    async def run() -> None:
        stub = Streamer([("add", {"a": "no number"})])
        async with serving(stub, tmp_path, mcp_max_rounds=2) as served:
            events = read((await post(served)).text)
            assert types(events, 1)[-2:] == [
                "response.mcp_call.failed",
                "response.output_item.done",
            ]
            stub.turns = [[("add", {"a": 1, "b": 1})]] * 9
            events = read((await post(served)).text)
            assert events[-1]["type"] == "response.incomplete"
            assert events[-1]["response"]["incomplete_details"] == {"reason": "max_tool_calls"}
            states = [item["status"] for item in events[-1]["response"]["output"][1:]]
            assert states == ["completed", "completed", "incomplete"]
            assert not any("mcp_call." in kind for kind in types(events, 3)[2:])

    asyncio.run(run())


def test_a_client_that_leaves_ends_the_call_and_the_turn(tmp_path: Path) -> None:
    async def run() -> None:
        stub = Streamer([("wait", {})])
        async with serving(stub, tmp_path) as served:
            leaving = asyncio.create_task(post(served))
            await served.seen.is_waiting.wait()
            leaving.cancel()
            await served.seen.was_cancelled.wait()
            while served.bench.num_open() or not served.bench.gateway.metrics.num_left:
                await asyncio.sleep(0.005)
            assert len(stub.posts) == 1
            # While a worker generates, its request is ended.
            stub.behaviour = "wait"
            leaving = asyncio.create_task(post(served))
            while len(stub.posts) < 2:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            leaving.cancel()
            while served.bench.num_open() or not stub.num_left:
                await asyncio.sleep(0.005)

    asyncio.run(run())


def test_workers_that_refuse_or_break_off(tmp_path: Path) -> None:
    async def run() -> None:
        stub = Streamer([("add", {"a": 1, "b": 1})])
        async with serving(stub, tmp_path, disable_retries=True) as served:
            stub.behaviour = 422
            refused = await post(served)
            assert (refused.status_code, "told to fail" in refused.text) == (422, True)
            stub.behaviour, stub.num_asked = "ok", len(stub.posts) + 1
            events = read((await post(served)).text)
            assert types(events)[-2:] == ["response.output_item.done", "error"]
            assert "with 422" in events[-1]["message"]
            for behaviour in ("cut", "cut_event"):
                stub.behaviour, stub.num_asked = behaviour, 99
                events = read((await post(served)).text)
                assert (events[-1]["type"], events[-1]["code"]) == ("error", "502")
            id_ = events[0]["response"]["id"]
            told = await served.bench.client.get(f"/v1/responses/{id_}")
            assert not told.is_success
            assert served.bench.num_open() == 0

    asyncio.run(run())


class Talker(PlainStub):
    """Says one text after another."""

    def __init__(self, tokenizer: Tokenizer, *says: str) -> None:
        super().__init__("a", tokenizer, "")
        self.says = [tokenizer.encode(text, add_special_tokens=False) for text in says]

    def events(self, asked: Asked) -> list[bytes]:
        self.ids = self.says.pop(0)
        return super().events(asked)


def test_chats_made_at_the_gateway_are_streamed_too(tmp_path: Path) -> None:
    async def run() -> None:
        directory = write_tokenizer(tmp_path / "model")
        call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
        tokenizer = Tokenizer.from_directory(directory)
        stub = Talker(tokenizer, f"<think>Hm.</think>Let me see.{call}", "It is 5.")
        options = {"model_path": str(directory), "tool_call_parser": "qwen25"}
        async with serving(stub, tmp_path, reasoning_parser="qwen3", **options) as served:
            events = read((await post(served)).text)
            kinds = [item["type"] for item in events[-1]["response"]["output"]]
            assert kinds == ["mcp_list_tools", "reasoning", "message", "mcp_call", "message"]
            assert list(dict.fromkeys(types(events, 3))) == CALL_EVENTS
            assert events[-1]["response"]["output"][3]["output"] == "5"
            deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
            assert len(deltas) > 4
            assert "".join(deltas) == "Let me see.It is 5."

    asyncio.run(run())
