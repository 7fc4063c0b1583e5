"""Chat completions that the gateway makes of engines which only generate tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from sapwood.gateway.routing_fields import packed_ids
from sapwood.history.sqlite import SqliteHistory
from sapwood.text.tokenizer import Tokenizer
from tests.gateway.plain.plain_stub import PlainStub, write_tokenizer
from tests.gateway.stubs import Bench, bench

PATH = "/v1/chat/completions"
CALL = 'On it.<tool_call>\n{"name": "find", "arguments": {"what": "é oak"}}\n</tool_call>'
SCHEMA = {"type": "object"}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": SCHEMA}}]
HELLO = [{"role": "user", "content": "Hello world"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)


@asynccontextmanager
async def chats(directory: Path, *stubs: PlainStub, **options: Any) -> AsyncIterator[Bench]:
    options = {"tool_call_parser": "qwen25", "reasoning_parser": "qwen3"} | options
    async with bench(*stubs, model_path=str(directory), **options) as made:
        yield made


def deltas(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: {")]
    return [json.loads(line)["choices"][0] for line in lines if json.loads(line)["choices"]]


@pytest.mark.parametrize("is_incremental", [False, True])
def test_thinking_content_and_calls_are_told_apart_streamed_or_not(
    directory: Path, tokenizer: Tokenizer, is_incremental: bool
) -> None:
    async def run() -> None:
        stub = PlainStub("a", tokenizer, f"<think>Hm.</think>{CALL}<|end|>")
        stub.is_incremental = is_incremental
        stub.reason = {"type": "stop", "matched": stub.ids[-1]}
        async with chats(directory, stub) as made:
            asked = {"messages": HELLO, "tools": TOOLS, "temperature": 0.5, "seed": 7}
            told = await made.post(PATH, **asked, headers={"x-correlation-id": "mine"})
            assert told.headers["x-request-id"] == "mine"
            assert stub.posts[0].headers["x-request-id"] == "mine"
            answer = told.json()
            (choice,) = answer["choices"]
            message = choice["message"]
            (call,) = message["tool_calls"]
            assert message["reasoning_content"] == "Hm."
            assert message["content"] == "On it."
            assert call["function"]["name"] == "find"
            assert json.loads(call["function"]["arguments"]) == {"what": "é oak"}
            assert (choice["finish_reason"], answer["model"]) == ("tool_calls", "m")
            sent = json.loads(stub.posts[0].body)
            prompt = tokenizer.decode(sent["input_ids"], skip_special_tokens=False)
            assert prompt.startswith("<|begin|>user: Hello world<|end|>")
            assert answer["usage"]["prompt_tokens"] == len(sent["input_ids"])
            assert answer["usage"]["completion_tokens"] == len(stub.ids)
            assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
            assert stub.posts[0].path == "/generate"
            assert sent["sampling_params"]["temperature"] == 0.5
            assert sent["sampling_params"]["sampling_seed"] == 7

            events = deltas(await made.post(PATH, **asked, stream=True))
            parts = [event["delta"] for event in events]
            assert "".join(part.get("reasoning_content") or "" for part in parts) == "Hm."
            assert "".join(part.get("content") or "" for part in parts) == "On it."
            calls = [one for part in parts for one in part.get("tool_calls", ())]
            arguments = "".join(one["function"]["arguments"] for one in calls)
            assert json.loads(arguments) == {"what": "é oak"}
            assert events[-1]["finish_reason"] == "tool_calls"
            assert made.num_open() == 0

    asyncio.run(run())


def test_messages_and_responses_are_made_of_tokens_too(
    directory: Path, tokenizer: Tokenizer
) -> None:
    async def run() -> None:
        stub = PlainStub("a", tokenizer, f"<think>Hm.</think>{CALL}<|end|>")
        stub.reason = {"type": "stop", "matched": stub.ids[-1]}
        history = SqliteHistory(None, retention_days=1.0)
        async with AsyncExitStack() as stack:
            stack.callback(history.close)
            made = await stack.enter_async_context(chats(directory, stub, history=history))
            anthropic = {"messages": HELLO, "tools": [{"name": "find", "input_schema": SCHEMA}]}
            told = await made.post("/v1/messages", **anthropic, max_tokens=64)
            answer = told.json()
            assert told.headers["x-request-id"] == stub.posts[0].headers["x-request-id"]
            kinds = [block["type"] for block in answer["content"]]
            assert kinds[-2:] == ["text", "tool_use"]
            assert answer["content"][-1]["input"] == {"what": "é oak"}
            assert (answer["stop_reason"], answer["model"]) == ("tool_use", "m")
            counted = await made.post("/v1/messages/count_tokens", **anthropic)
            used = answer["usage"]
            assert used["cache_read_input_tokens"] == 3
            assert counted.json()["input_tokens"] == used["input_tokens"] + 3
            streamed = await made.post("/v1/messages", **anthropic, max_tokens=64, stream=True)
            assert "event: message_stop" in streamed.text
            refused = await made.post("/v1/messages", **anthropic)
            assert (refused.status_code, refused.json()["type"]) == (400, "error")

            tools = [{"type": "function", "name": "find", "parameters": SCHEMA}]
            first = (await made.post("/v1/responses", input="Hello world", tools=tools)).json()
            assert [item["type"] for item in first["output"]] == [
                "reasoning",
                "message",
                "function_call",
            ]
            assert (first["status"], first["store"]) == ("completed", True)
            result = {
                "type": "function_call_output",
                "call_id": first["output"][-1]["call_id"],
                "output": "an oak",
            }
            more = {"previous_response_id": first["id"], "input": [result], "tools": tools}
            events = (await made.post("/v1/responses", **more, stream=True)).text
            assert "event: response.completed" in events
            prompt = tokenizer.decode(
                json.loads(stub.posts[-1].body)["input_ids"], skip_special_tokens=False
            )
            assert prompt.index("Hello world") < prompt.index("an oak")
            kept = await made.client.get(f"/v1/responses/{first['id']}")
            assert kept.json()["output"] == first["output"]
            refused = await made.post("/v1/responses", input="Hi", background=True)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "background")
            refused = await made.post("/v1/responses", input="Hi", top_p=2.0)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_p")
            assert {asked.path for asked in stub.posts} == {"/generate"}
            assert made.num_open() == 0

    asyncio.run(run())


def test_texts_are_parsed_without_a_worker(directory: Path, tokenizer: Tokenizer) -> None:
    async def run() -> None:
        stub = PlainStub("a", tokenizer, "unused")
        async with chats(directory, stub) as made:
            client = made.client
            for name in ({}, {"parser": "qwen25"}, {"tool_call_parser": "qwen25"}):
                body = {"text": CALL, "tools": TOOLS, **name}
                told = (await client.post("/parse/function_call", json=body)).json()
                (call,) = told["tool_calls"]
                assert json.loads(call["function"]["arguments"]) == {"what": "é oak"}
                assert (call["function"]["name"], told["remaining_text"]) == ("find", "On it.")
            body = {"text": "<think>Hm.</think>Yes.", "parser": "deepseek-r1"}
            told = (await client.post("/parse/reasoning", json=body)).json()
            assert told == {"normal_text": "Yes.", "reasoning_text": "Hm.", "success": True}
            for path, wrong in (
                ("function_call", {"text": CALL, "tools": TOOLS, "parser": "none such"}),
                ("function_call", {"text": CALL, "parser": "qwen25"}),
                ("reasoning", {**body, "reasoning_parser": "qwen3"}),
                ("reasoning", {"text": 7}),
            ):
                refused = await client.post(f"/parse/{path}", json=wrong)
                assert refused.status_code == 400, refused.text
            assert stub.posts == []
        async with bench(stub, api_key="user", admin_api_key="boss") as made:
            made.client.headers["authorization"] = "Bearer user"
            refused = await made.client.post("/parse/reasoning", json=body)
            assert refused.status_code == 403
            made.client.headers["authorization"] = "Bearer boss"
            assert (await made.client.post("/parse/reasoning", json=body)).json() == told

    asyncio.run(run())


def test_stop_strings_end_the_answer_and_the_request_at_the_worker(
    directory: Path, tokenizer: Tokenizer
) -> None:
    async def run() -> None:
        stub = PlainStub("a", tokenizer, "Oak, birch and many more trees" + " and more" * 200)
        stub.event_s = 0.001
        async with chats(directory, stub) as made:
            asked = {"messages": HELLO, "stop": ["rch and", "and many", "ELM"], "n": 2}
            answer = (await made.post(PATH, **asked)).json()
            for choice in answer["choices"]:
                assert choice["message"]["content"] == "Oak, bi"
                assert choice["matched_stop"] == "rch and"
            assert "stop" not in json.loads(stub.posts[0].body)["sampling_params"]
            while stub.num_left < 2 or made.num_open():
                await asyncio.sleep(0.005)

    asyncio.run(run())


def test_failures_before_the_first_token_go_elsewhere_and_later_ones_are_told(
    directory: Path, tokenizer: Tokenizer
) -> None:
    async def run() -> None:
        bad, good = (PlainStub(name, tokenizer, "Hello, and many more trees") for name in "ab")
        async with chats(directory, bad, good) as made:
            bad.behaviour = 503
            for _ in range(4):
                assert (await made.post(PATH, messages=HELLO)).status_code == 200
            bad.behaviour = good.behaviour = "cut"
            answer = await made.post(PATH, messages=HELLO)
            assert answer.status_code == 502
            assert "broke off" in answer.json()["message"]
            streamed = await made.post(PATH, messages=HELLO, stream=True)
            assert streamed.status_code == 200
            assert "broke off" in streamed.text
            bad.behaviour = good.behaviour = 400
            refused = await made.post(PATH, messages=HELLO)
            assert refused.status_code == 400
            assert refused.json()["message"] == "told to fail"
            good.behaviour = bad.behaviour = "ok"
            good.reason = bad.reason = {"type": "abort", "message": "no room", "status_code": 503}
            aborted = await made.post(PATH, messages=HELLO)
            assert (aborted.status_code, made.num_open()) == (503, 0)

    asyncio.run(run())


def test_equal_beginnings_go_to_the_same_worker_by_their_token_ids(
    directory: Path, tokenizer: Tokenizer
) -> None:
    async def run() -> None:
        stubs = [PlainStub(name, tokenizer, "Hello world") for name in "abc"]
        async with chats(directory, *stubs, policy="cache_aware") as made:
            long = [{"role": "user", "content": f"{topic} " * 40} for topic in ("a", "b", "c")]
            for message in long * 2:
                assert (await made.post(PATH, messages=[message])).status_code == 200
            # The same tokens in another dialect.
            ids = json.loads(stubs[0].posts[0].body)["input_ids"]
            await made.post("/generate", input_ids=ids, stream=True)
            text = tokenizer.decode(ids, skip_special_tokens=False)
            await made.post("/generate", text=text, stream=True)
            assert [len(stub.posts) for stub in stubs] == [4, 2, 2]
            prefixes = made.gateway.fleet.prefixes
            assert prefixes is not None
            assert prefixes.num_known_bytes > prefixes.num_bytes / 2

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": HELLO, "thinking_budget": 3}, "thinking_budget"),
        ({"messages": HELLO, "repeat_last_n": 3}, "repeat_last_n"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": HELLO, "lora_path": "x"}, "lora_path"),
        ({"messages": [{"role": "user", "content": "x" * (5 << 20)}]}, "messages"),
        ({"messages": HELLO, "nonsense": 1}, "nonsense"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    directory: Path, tokenizer: Tokenizer, fields: dict[str, Any], param: str
) -> None:
    async def run() -> None:
        stub = PlainStub("a", tokenizer, "Hello")
        async with chats(directory, stub) as made:
            for is_stream in (False, True):
                answer = await made.post(PATH, **fields, stream=is_stream)
                assert answer.status_code == 400, answer.text
                assert answer.json()["param"] == param
            assert not stub.posts

    asyncio.run(run())


def test_log_probabilities_and_grammars_go_along(directory: Path, tokenizer: Tokenizer) -> None:
    async def run() -> None:
        stub = PlainStub("a", tokenizer, "Hello world")
        async with chats(directory, stub, reasoning_parser="none") as made:
            answer = await made.post(
                PATH,
                messages=HELLO,
                logprobs=True,
                top_logprobs=1,
                response_format={"type": "json_object"},
            )
            told = answer.json()["choices"][0]["logprobs"]["content"]
            assert [one["logprob"] for one in told] == [-0.5] * len(stub.ids)
            assert "".join(one["token"] for one in told) == "Hello world"
            assert [len(one["top_logprobs"]) for one in told] == [1] * len(stub.ids)
            sent = json.loads(stub.posts[0].body)
            assert json.loads(sent["sampling_params"]["json_schema"]) == {"type": "object"}

    asyncio.run(run())


def test_a_model_without_a_tokenizer_is_answered_by_its_worker(
    directory: Path, tokenizer: Tokenizer
) -> None:
    async def run() -> None:
        stub = PlainStub("a", tokenizer, "Hello")
        stub.models = ["m", "other"]
        async with chats(directory, stub) as made:
            answer = await made.post(PATH, messages=HELLO, model="other")
            assert answer.json() == {"worker": "a", "choices": []}
            assert stub.posts[0].path == PATH

    asyncio.run(run())


def test_token_ids_as_policies_see_them_begin_alike() -> None:
    assert packed_ids([1, 70_000, 3]).startswith(packed_ids([1, 70_000]))
    assert len(packed_ids(range(1 << 20))) <= 256 << 10


def test_the_official_clients_take_what_the_gateway_makes(
    directory: Path, tokenizer: Tokenizer
) -> None:
    async def run() -> None:
        stub = PlainStub("a", tokenizer, f"<think>Hm.</think>{CALL}<|end|>")
        stub.reason = {"type": "stop", "matched": stub.ids[-1]}
        async with (
            chats(directory, stub) as made,
            httpx.AsyncClient(trust_env=False) as plain,
            anthropic.AsyncAnthropic(base_url=made.url, api_key="k", max_retries=0) as theirs,
        ):
            ours = openai.AsyncOpenAI(
                base_url=f"{made.url}/v1", api_key="k", max_retries=0, http_client=plain
            )
            asked: Any = {"model": "m", "messages": HELLO, "tools": TOOLS}
            told = await ours.chat.completions.create(**asked)
            assert told.choices[0].message.tool_calls[0].function.name == "find"
            async with ours.chat.completions.stream(**asked) as stream:
                last = await stream.get_final_completion()
            assert last.choices[0].message.content == "On it."
            assert last.choices[0].message.tool_calls[0].function.name == "find"
            made_of = await ours.responses.create(model="m", input="Hello world")
            assert [item.type for item in made_of.output] == ["reasoning", "message"]

            tools = [{"name": "find", "input_schema": SCHEMA}]
            wanted: Any = {"model": "m", "messages": HELLO, "tools": tools, "max_tokens": 64}
            message = await theirs.messages.create(**wanted)
            assert message.content[-1].input == {"what": "é oak"}
            async with theirs.messages.stream(**wanted) as events:
                final = await events.get_final_message()
            assert [block.type for block in final.content] == [b.type for b in message.content]
            assert final.content[-1].input == {"what": "é oak"}

    asyncio.run(run())
