"""Responses whose tools the gateway calls, on real MCP servers."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from sapwood.history.sqlite import SqliteHistory
from tests.gateway.responders import Responder
from tests.gateway.stubs import Asked, Bench, Running, Stub, bench

pytest.importorskip("mcp", reason="the package mcp is not installed")

PROTOCOLS = ("stdio", "sse", "streamable")
TOOLS = [{"type": "mcp", "server_label": "tools", "require_approval": "never"}]
CAREFUL = [{"type": "mcp", "server_label": "tools"}]


class Caller(Responder):
    """A worker that makes the calls of `turns`, one entry per request, and then says what it got.

    turns  (function name, arguments) of each call
    """

    def __init__(self, *turns: Sequence[tuple[str, object]]) -> None:
        super().__init__()
        self.turns = list(turns)

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(asked.body) for asked in self.posts]

    def answer(self, asked: Asked) -> dict[str, Any]:
        body = json.loads(asked.body)
        results = [item["output"] for item in body["input"] if "output" in item]
        said = json.dumps({"input": "|".join(results)}).encode()
        answer = super().answer(replace(asked, body=said))
        answer["usage"] = {"input_tokens": 5, "output_tokens_details": {"reasoning_tokens": 1}}
        calls = self.turns.pop(0) if self.turns else []
        if calls:
            answer["output"] = [
                {
                    "id": f"fc_{n}",
                    "call_id": f"call_{n}",
                    "type": "function_call",
                    "name": name,
                    "arguments": args if isinstance(args, str) else json.dumps(args),
                    "status": "completed",
                }
                for n, (name, args) in enumerate(calls)
            ]
        return answer


@dataclass
class Served:
    bench: Bench
    client: openai.AsyncOpenAI
    seen: Any
    tools: Running | None
    app: Any

    async def create(self, **fields: Any) -> Any:
        fields = {"model": "m", "input": "go", "tools": TOOLS} | fields
        return await self.client.responses.create(**fields)


@asynccontextmanager
async def serving(
    stub: Stub, tmp_path: Path, protocol: str = "streamable", **options: Any
) -> AsyncIterator[Served]:
    from tests.gateway.mcp.tool_server import Seen, tool_server

    seen = Seen()
    server = tool_server(seen)
    history = SqliteHistory(None, retention_days=1.0)
    async with AsyncExitStack() as stack:
        stack.callback(history.close)
        running, app = None, None
        told: dict[str, Any] = {"name": "tools", "protocol": protocol}
        if protocol == "stdio":
            program = Path(__file__).with_name("tool_server.py")
            told |= {"command": sys.executable, "args": [str(program)]}
        else:
            is_sse = protocol == "sse"
            app = server.sse_app() if is_sse else server.streamable_http_app()
            await stack.enter_async_context(app.router.lifespan_context(app))
            running = await stack.enter_async_context(Running(app))
            told["url"] = running.url + ("/sse" if is_sse else "/mcp")
        path = tmp_path / "mcp.json"
        path.write_text(json.dumps({"servers": [told]}), "utf-8")
        made = await stack.enter_async_context(
            bench(stub, history=history, mcp_config_path=str(path), **options)
        )
        plain = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
        client = openai.AsyncOpenAI(
            base_url=f"{made.url}/v1", api_key="k", max_retries=0, http_client=plain
        )
        yield Served(made, client, seen, running, app)


def kinds(response: Any) -> list[str]:
    return [item.type for item in response.output]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_model_goes_on_from_what_a_tool_said(protocol: str, tmp_path: Path) -> None:
    async def run() -> None:
        stub = Caller([("add", {"a": 2, "b": 3})], [("take_note", {"text": "5"})])
        async with serving(stub, tmp_path, protocol) as served:
            made = await served.create(tool_choice="required")
            assert kinds(made) == ["mcp_list_tools", "mcp_call", "mcp_call", "message"]
            assert [tool.name for tool in made.output[0].tools][:2] == ["add", "take.note"]
            call = made.output[1]
            assert (call.output, call.status, call.server_label) == ("5", "completed", "tools")
            assert made.output[2].name == "take.note"
            assert made.output_text == "u:5|noted 5"
            assert made.usage.input_tokens == 15
            assert made.usage.output_tokens_details.reasoning_tokens == 3
            assert made.tools[0].type == "mcp"
            first, second, _ = stub.bodies
            assert {tool["name"]: tool["type"] for tool in first["tools"]} == {
                "add": "function",
                "take_note": "function",
                "repeat": "function",
                "wait": "function",
            }
            # A model that has to call in each turn would never end.
            assert (first["tool_choice"], second["tool_choice"]) == ("required", "auto")
            # What comes later knows of the calls, even where it has no tools.
            again = await served.create(input="2", previous_response_id=made.id, tools=[])
            assert again.output_text == "u:5|noted 5"
            later = await served.create(input="2", previous_response_id=made.id)
            assert kinds(later) == ["message"]
            counted = served.bench.gateway.metrics.exposition().decode()
            assert 'smg_mcp_tool_calls_total{result="success",server="tools"} 2.0' in counted

    asyncio.run(run())


def test_calls_that_need_approval_wait_for_it(tmp_path: Path) -> None:
    async def run() -> None:
        note = [("take_note", {"text": "a"})]
        stub = Caller(note)
        async with serving(stub, tmp_path) as served:
            asked = await served.create(tools=CAREFUL)
            assert kinds(asked) == ["mcp_list_tools", "mcp_approval_request"]
            assert served.seen.notes == []
            yes = {
                "type": "mcp_approval_response",
                "approval_request_id": asked.output[1].id,
                "approve": True,
            }
            refused = await served.create(
                tools=CAREFUL,
                previous_response_id=asked.id,
                input=[{**yes, "approve": False, "reason": "not now"}],
            )
            assert refused.output_text == "u:the user did not allow this call: not now"
            assert served.seen.notes == []
            done = await served.create(tools=CAREFUL, previous_response_id=asked.id, input=[yes])
            assert kinds(done) == ["mcp_call", "message"]
            assert done.output[0].approval_request_id == asked.output[1].id
            assert done.output_text == "u:noted a"
            assert served.seen.notes == ["a"]
            # A client may keep the conversation itself; what was done is not done again.
            items = [item.to_dict() for item in [*asked.output, *done.output]]
            items = [*items[:2], yes, *items[2:]]
            for sent, num_notes in ((items, 1), (items[:3], 2)):
                last = await served.create(tools=CAREFUL, input=sent, store=False)
                assert last.output_text == "u:noted a"
                assert len(served.seen.notes) == num_notes
            with pytest.raises(openai.BadRequestError, match="must name the id"):
                await served.create(tools=CAREFUL, input=[yes])
            only_add = [{**CAREFUL[0], "allowed_tools": ["add"]}]
            with pytest.raises(openai.BadRequestError, match="not among the tools"):
                await served.create(tools=only_add, previous_response_id=asked.id, input=[yes])
            with pytest.raises(openai.BadRequestError, match="needs its MCP server"):
                await served.create(tools=[], previous_response_id=asked.id, input=[yes])

    asyncio.run(run())


def test_only_some_tools_need_approval(tmp_path: Path) -> None:
    async def run() -> None:
        stub = Caller([("add", {"a": 1, "b": 1}), ("take_note", {"text": "a"})])
        async with serving(stub, tmp_path) as served:
            rule = {"never": {"read_only": True}}
            made = await served.create(tools=[{**CAREFUL[0], "require_approval": rule}])
            assert kinds(made)[1:] == ["mcp_call", "mcp_approval_request"]
            assert served.seen.notes == []

    asyncio.run(run())


def test_the_clients_own_functions_are_left_to_it(tmp_path: Path) -> None:
    async def run() -> None:
        stub = Caller([("add", {"a": 1, "b": 1}), ("mine", {})])
        async with serving(stub, tmp_path) as served:
            mine = {"type": "function", "name": "mine", "parameters": {}, "strict": False}
            made = await served.create(tools=[*TOOLS, mine])
            assert kinds(made)[1:] == ["mcp_call", "function_call"]
            assert len(stub.posts) == 1
            output = {"type": "function_call_output", "call_id": "call_1", "output": "ok"}
            more = await served.create(
                tools=[*TOOLS, mine], previous_response_id=made.id, input=[output]
            )
            assert more.output_text == "u:2|ok"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (("repeat", {"num_chars": 1001}), "has 1001 bytes, but at most 1000"),
        (("add", {"a": "no number"}), "add"),
        (("add", "[1]"), "no JSON object"),
        (("add", "{"), "no JSON object"),
        (("wait", {}), "did not answer within 0.5 s"),
    ],
)
def test_the_model_is_told_of_a_call_that_fails(
    call: tuple[str, object], told: str, tmp_path: Path
) -> None:
    async def run() -> None:
        stub = Caller([call])
        options = {"mcp_max_result_bytes": 1000, "mcp_call_timeout_secs": 0.5}
        if call[0] != "wait":
            options["mcp_call_timeout_secs"] = 60.0
        async with serving(stub, tmp_path, **options) as served:
            body = {"model": "m", "input": "go", "tools": TOOLS}
            made = (await served.bench.client.post("/v1/responses", json=body)).json()
            failed = made["output"][1]
            assert (failed["status"], failed["output"]) == ("failed", None)
            assert told in failed["error"]["content"]
            assert stub.bodies[1]["input"][-1]["output"] == failed["error"]["content"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "num_calls"), [({}, 3), ({"max_tool_calls": 2}, 2), ({"max_tool_calls": 99}, 3)]
)
def test_a_model_that_never_stops_calling(
    fields: dict[str, Any], num_calls: int, tmp_path: Path
) -> None:
    async def run() -> None:
        stub = Caller(*[[("add", {"a": 1, "b": 1})]] * 9)
        async with serving(stub, tmp_path, mcp_max_rounds=3) as served:
            made = await served.create(**fields)
            assert made.status == "incomplete"
            assert made.incomplete_details.reason == "max_tool_calls"
            states = [item.status for item in made.output[1:]]
            assert states == ["completed"] * num_calls + ["incomplete"]
            assert len(stub.posts) == num_calls + 1
            assert [body.get("tool_choice") for body in stub.bodies][-1] == "none"

    asyncio.run(run())


WRONG = (
    ({"background": True}, "background is not offered"),
    ({"max_tool_calls": 0}, "max_tool_calls must be"),
    ({"tools": [{**TOOLS[0], "server_url": "http://10.0.0.1"}]}, "server_url is not taken"),
    ({"tools": [{**TOOLS[0], "authorization": "x"}]}, "authorization is not taken"),
    ({"tools": [{**TOOLS[0], "server_label": "other"}]}, "MCP servers of this gateway are tools"),
    ({"tools": [{"type": "mcp"}]}, "server_label"),
    ({"tools": [{**TOOLS[0], "strange": 1}]}, "strange"),
    ({"tools": [{**TOOLS[0], "require_approval": "maybe"}]}, "require_approval"),
    ({"tools": [*TOOLS, *TOOLS]}, "names the MCP server 'tools' again"),
    ({"tools": [*TOOLS, {"type": "function", "name": "take_note"}]}, "have the name 'take_note'"),
    ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "names no tool"),
    ({"input": [{"type": "mcp_approval_response", "approve": 1}]}, "must be true or false"),
    ({"input": [{"type": "mcp_call", "id": [1], "status": "failed"}]}, "must be a text"),
    (
        {"input": [{"type": "mcp_approval_response", "approval_request_id": [], "approve": True}]},
        "must name the id",
    ),
)


def test_requests_that_cannot_be_meant(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(stub := Caller(), tmp_path) as served:
            for fields, message in WRONG:
                body = {"model": "m", "input": "go", "tools": TOOLS} | fields
                told = await served.bench.client.post("/v1/responses", json=body)
                assert told.status_code == 400, (fields, told.text)
                assert message in told.json()["error"]["message"], fields
            assert stub.posts == []

    asyncio.run(run())


def test_a_client_that_leaves_ends_the_call(tmp_path: Path) -> None:
    async def run() -> None:
        stub = Caller([("wait", {})])
        async with serving(stub, tmp_path) as served:
            leaving = asyncio.create_task(served.create())
            await served.seen.is_waiting.wait()
            leaving.cancel()
            await served.seen.was_cancelled.wait()
            while served.bench.num_open() or not served.bench.gateway.metrics.num_left:
                await asyncio.sleep(0.005)
            assert len(stub.posts) == 1

    asyncio.run(run())


def test_a_server_that_is_gone_and_comes_back(tmp_path: Path) -> None:
    async def run() -> None:
        stub = Caller()
        async with serving(stub, tmp_path) as served:
            assert served.tools is not None
            assert kinds(await served.create()) == ["mcp_list_tools", "message"]
            kept = await served.tools.kill()
            body = {"model": "m", "input": "go", "tools": TOOLS}
            told = await served.bench.client.post("/v1/responses", json=body)
            assert told.status_code == 424
            assert "the MCP server 'tools' failed" in told.json()["error"]["message"]
            kept.close()
            async with Running(served.app, served.tools.port):
                assert kinds(await served.create()) == ["mcp_list_tools", "message"]

    asyncio.run(run())


def test_a_workers_refusal_is_passed_on(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(stub := Caller(), tmp_path) as served:
            stub.behaviour = 422
            body = {"model": "m", "input": "go", "tools": TOOLS}
            told = await served.bench.client.post("/v1/responses", json=body)
            assert (told.status_code, told.json()["error"]["message"]) == (422, "told to fail")

    asyncio.run(run())
