"""Tokenizers, templates and parsers that workers bring for the chats of their models."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.gateway.fleet import Fleet
from sapwood.gateway.model_parts import MAX_PATH_CHARACTERS, MAX_TEMPLATE_CHARACTERS
from sapwood.gateway.policies.registry import make_policies
from sapwood.gateway.worker import WorkerSpec, WorkerState
from sapwood.schema.config.gateway import GatewayConfig
from sapwood.text.tokenizer import Tokenizer
from tests.gateway.plain.plain_stub import TEMPLATE, PlainStub, write_tokenizer
from tests.gateway.stubs import Bench, Running, bench

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello world"}]
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
TAGGED = '<think>Hm.</think><tool_call>\n{"name": "find", "arguments": {"n": 1}}\n</tool_call>'
LISTED = '[TOOL_CALLS][{"name": "find", "arguments": {"n": 2}}]'
QWEN = {"tool_parser": "qwen25", "reasoning_parser": "qwen3"}
OTHER_TEMPLATE = TEMPLATE.replace("{{ m.role }}", "[{{ m.role }}]")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)


def stub(name: str, tokenizer: Tokenizer, says: str = TAGGED, model: str = "m") -> PlainStub:
    made = PlainStub(name, tokenizer, says)
    made.models = [model]
    return made


async def add(made: Bench, engine: Running, directory: Path, **fields: Any) -> httpx.Response:
    asked = {"url": engine.url, "tokenizer_path": str(directory), **fields}
    return await made.client.post("/workers", json=asked)


async def state_of(made: Bench, engine: Running) -> dict[str, Any]:
    """The worker as it is shown, once it has left its start behind."""
    while True:
        workers = (await made.client.get("/workers")).json()["workers"]
        shown = next(one for one in workers if one["url"] == engine.url)
        if shown["status"] != "starting":
            return dict(shown)
        await asyncio.sleep(0.01)


async def remove(made: Bench, engine: Running) -> None:
    id_ = (await state_of(made, engine))["id"]
    await made.client.delete(f"/workers/{id_}")
    while (await made.client.get(f"/workers/{id_}")).status_code != 404:
        await asyncio.sleep(0.01)


async def tokenizer_names(made: Bench) -> list[str]:
    told = (await made.client.get("/v1/tokenizers")).json()["tokenizers"]
    return [entry["name"] for entry in told]


def message(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]


def prompt(engine: PlainStub, tokenizer: Tokenizer) -> str:
    sent = json.loads(engine.posts[-1].body)
    return tokenizer.decode(sent["input_ids"], skip_special_tokens=False)


def test_each_model_has_the_parsers_and_the_template_of_its_workers(
    directory: Path, tokenizer: Tokenizer
) -> None:
    async def run() -> None:
        one, other = stub("a", tokenizer), stub("b", tokenizer, LISTED, "n")
        third = stub("c", tokenizer, "unused", "o")
        async with (
            bench() as made,
            Running(one) as first,
            Running(other) as second,
            Running(third) as plain,
        ):
            told = await add(made, first, directory, **QWEN)
            assert told.status_code == 202
            # A model that the worker does not name itself.
            await add(
                made,
                second,
                directory,
                model_id="named",
                tool_parser="mistral",
                chat_template=OTHER_TEMPLATE,
            )
            await made.client.post("/workers", json={"url": plain.url})
            for engine in (first, second, plain):
                shown = await state_of(made, engine)
                assert shown["status"] == "ready", shown
            assert {"m", "named"} == set(await tokenizer_names(made))
            assert (await state_of(made, first))["tool_parser"] == "qwen25"

            asked = {"messages": HELLO, "tools": TOOLS}
            told_m = message(await made.post(CHAT, **asked))
            assert told_m["reasoning_content"] == "Hm."
            assert json.loads(told_m["tool_calls"][0]["function"]["arguments"]) == {"n": 1}
            assert prompt(one, tokenizer).startswith("<|begin|>user: Hello")
            told_n = message(await made.post(CHAT, **asked, model="named"))
            assert json.loads(told_n["tool_calls"][0]["function"]["arguments"]) == {"n": 2}
            assert prompt(other, tokenizer).startswith("<|begin|>[user]: Hello")
            # A model whose worker brings nothing is answered by it.
            await made.post(CHAT, **asked, model="o")
            assert [asked.path for asked in third.posts] == [CHAT]
            nameless = await made.client.post(CHAT, json=asked)
            assert nameless.status_code == 400
            assert "m, named, o" in nameless.json()["message"]

            # A model of which no worker is ready makes no difference to those that name none.
            await made.client.post("/workers", json={"url": "http://127.0.0.1:9", "model_id": "p"})
            for engine in (second, plain):
                await remove(made, engine)
            nameless = await made.client.post(CHAT, json=asked)
            assert message(nameless)["reasoning_content"] == "Hm."

            answer = await made.post("/v1/messages", messages=HELLO, max_tokens=64)
            assert answer.json()["content"][0]["thinking"] == "Hm."
            answer = await made.post("/v1/responses", input="Hello")
            assert answer.json()["output"][0]["type"] == "reasoning"
            counted = await made.post("/v1/tokenize", prompt="Hello")
            assert counted.json()["count"] > 0
            assert all(asked.path == "/generate" for asked in one.posts + other.posts)

    asyncio.run(run())


def test_workers_of_one_model_must_not_contradict_each_other(
    directory: Path, tokenizer: Tokenizer
) -> None:
    async def run() -> None:
        engines = [stub(name, tokenizer) for name in "abcd"]
        async with (
            bench() as made,
            Running(engines[0]) as a,
            Running(engines[1]) as b,
            Running(engines[2]) as c,
            Running(engines[3]) as d,
        ):
            await add(made, a, directory, model_id="m", **QWEN)
            refused = await add(made, b, directory, model_id="m", tool_parser="mistral")
            told = refused.json()["error"]
            assert (refused.status_code, told["param"]) == (400, "tool_parser")
            assert "'qwen25' and 'mistral'" in told["message"]
            assert "reasoning_parser 'qwen3' and None" in told["message"]
            # The gateway only learns from the worker that it serves the same model.
            assert (await state_of(made, a))["status"] == "ready"
            assert (await add(made, b, directory, tool_parser="mistral")).status_code == 202
            shown = await state_of(made, b)
            assert shown["status"] == "failed"
            assert "'qwen25' and 'mistral'" in shown["last_error"]
            # The same parts, and none, go along.
            await add(made, c, directory, **QWEN)
            await made.client.post("/workers", json={"url": d.url})
            for engine in (c, d):
                assert (await state_of(made, engine))["status"] == "ready"
            for _ in range(3):
                assert message(await made.post(CHAT, messages=HELLO))["reasoning_content"] == "Hm."
            assert [len(engine.posts) for engine in engines] == [1, 0, 1, 1]

    asyncio.run(run())


def test_what_a_worker_brought_goes_with_the_last_one_that_brought_it(
    directory: Path, tokenizer: Tokenizer
) -> None:
    async def run() -> None:
        engines = [stub(name, tokenizer) for name in "abc"]
        async with (
            bench() as made,
            Running(engines[0]) as a,
            Running(engines[1]) as b,
            Running(engines[2]) as c,
        ):
            for engine in (a, b):
                await add(made, engine, directory, **QWEN)
            await made.client.post("/workers", json={"url": c.url})
            for engine in (a, b, c):
                assert (await state_of(made, engine))["status"] == "ready"
            for method, path in (("DELETE", "/v1/tokenizers/m"), ("POST", "/v1/tokenizers")):
                body = {"name": "m", "source": str(directory)} if method == "POST" else None
                refused = await made.client.request(method, path, json=body)
                assert refused.status_code == 400
                assert "belongs to the workers" in refused.text
            await remove(made, a)
            assert message(await made.post(CHAT, messages=HELLO))["reasoning_content"] == "Hm."
            assert await tokenizer_names(made) == ["m"]
            await remove(made, b)
            assert await tokenizer_names(made) == []
            await made.post(CHAT, messages=HELLO)
            assert engines[2].posts[-1].path == CHAT
            # Others may bring something else now.
            await remove(made, c)
            await add(made, a, directory, tool_parser="mistral")
            assert (await state_of(made, a))["status"] == "ready"
            assert "<think>" in message(await made.post(CHAT, messages=HELLO))["content"]

    asyncio.run(run())


def test_a_worker_whose_tokenizer_cannot_be_used_gets_no_requests(
    directory: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    async def run() -> None:
        bare = write_tokenizer(tmp_path / "bare")
        (bare / "chat_template.jinja").unlink()
        engine = stub("a", tokenizer)
        several = stub("b", tokenizer)
        several.models = ["m", "n"]
        async with bench() as made, Running(engine) as a, Running(several) as b:
            for source, fields, why in (
                (tmp_path / "none", QWEN, "cannot be used"),
                (bare, QWEN, "has no chat template"),
                (directory, {**QWEN, "chat_template": "{% for"}, "cannot be used"),
                ("a\0b", QWEN, "cannot be used"),
            ):
                assert (await add(made, a, source, **fields)).status_code == 202
                shown = await state_of(made, a)
                assert shown["status"] == "failed"
                assert why in shown["last_error"]
                assert (await made.post(CHAT, messages=HELLO)).status_code == 503
                await remove(made, a)
                assert await tokenizer_names(made) == []
            await add(made, b, directory, **QWEN)
            shown = await state_of(made, b)
            assert "m, n; remove the worker and add it with a model_id" in shown["last_error"]
            # Without a template there are token ids, and the worker makes the chats.
            await add(made, a, bare)
            assert (await state_of(made, a))["status"] == "ready"
            assert (await made.post("/v1/tokenize", prompt="Hello")).json()["count"] > 0
            await made.post(CHAT, messages=HELLO)
            assert engine.posts[-1].path == CHAT

    asyncio.run(run())


def test_a_worker_that_comes_back_with_another_model_brings_its_parts_to_that(
    directory: Path, tokenizer: Tokenizer
) -> None:
    async def run() -> None:
        engine = stub("a", tokenizer)
        options = {
            "health_check_interval_secs": 0.02,
            "health_failure_threshold": 1,
            "health_success_threshold": 1,
        }
        async with bench(**options) as made, Running(engine) as a:
            await add(made, a, directory, **QWEN)
            assert (await state_of(made, a))["models"] == ["m"]
            engine.health, engine.models = 503, ["n"]
            while (await state_of(made, a))["status"] != "unhealthy":
                await asyncio.sleep(0.01)
            engine.health = 200
            while (await state_of(made, a))["status"] != "ready":
                await asyncio.sleep(0.01)
            assert await tokenizer_names(made) == ["n"]
            told = await made.post(CHAT, messages=HELLO, model="n")
            assert message(told)["reasoning_content"] == "Hm."

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tokenizer_path": None, "tool_parser": "qwen25"}, "tool_parser"),
        ({"tokenizer_path": None, "reasoning_parser": "auto"}, "reasoning_parser"),
        ({"chat_template": "chatml"}, "chat_template"),
        ({**QWEN, "chat_template": "x" * (MAX_TEMPLATE_CHARACTERS + 1)}, "chat_template"),
        ({"tokenizer_path": ""}, "tokenizer_path"),
        ({"tokenizer_path": "x" * (MAX_PATH_CHARACTERS + 1)}, "tokenizer_path"),
        ({**QWEN, "runtime": "external"}, "runtime"),
        ({**QWEN, "runtime": "vllm"}, "runtime"),
        ({"tool_parser": "nobody's"}, None),
        ({"reasoning_parser": "nobody's"}, None),
        ({**QWEN, "model_id": "a name\n"}, "name"),
    ],
)
def test_parts_that_cannot_be_are_refused(
    directory: Path, fields: dict[str, Any], param: str | None
) -> None:
    async def run() -> None:
        async with bench() as made:
            asked = {"url": "http://127.0.0.1:9", "tokenizer_path": str(directory), **fields}
            refused = await made.client.post("/workers", json=asked)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == param
            assert (await made.client.get("/workers")).json()["total"] == 0
            assert await tokenizer_names(made) == []

    asyncio.run(run())


def test_parts_are_not_changed_later(directory: Path, tokenizer: Tokenizer) -> None:
    async def run() -> None:
        async with bench(stub("a", tokenizer)) as made:
            id_ = (await made.client.get("/workers")).json()["workers"][0]["id"]
            for name in ("tokenizer_path", "chat_template", "tool_parser", "reasoning_parser"):
                refused = await made.client.put(f"/workers/{id_}", json={name: "x"})
                assert refused.status_code == 400
                assert refused.json()["error"]["param"] == name

    asyncio.run(run())


def test_a_prompts_answer_has_the_room_of_its_own_model(
    directory: Path, tokenizer: Tokenizer
) -> None:
    async def run() -> None:
        engine, short = stub("a", tokenizer), stub("b", tokenizer, model="n")
        engine.context, short.context = 1000, 100
        async with bench() as made, Running(engine) as a, Running(short) as b:
            await add(made, a, directory, model_id="named", **QWEN)
            await made.client.post("/workers", json={"url": b.url})
            for one in (a, b):
                assert (await state_of(made, one))["status"] == "ready"
            message(await made.post(CHAT, messages=HELLO, model="named"))
            sent = json.loads(engine.posts[-1].body)
            room = 1000 - len(sent["input_ids"]) - 1
            assert sent["sampling_params"]["max_new_tokens"] == room
            assert made.gateway.fleet.max_model_len == 100

    asyncio.run(run())


def test_a_gateway_without_tokenizers_says_what_is_missing() -> None:
    async def run() -> None:
        config = GatewayConfig(port=0)
        fleet = Fleet(config, make_policies(config, None, None))  # type: ignore[arg-type]
        spec = WorkerSpec(url="http://127.0.0.1:9", tokenizer_path="/models/m")
        with pytest.raises(InvalidRequest, match="pip install tokenizers jinja2"):
            fleet.add(spec)
        assert len(fleet) == 0
        worker = fleet.add(WorkerSpec(url="http://127.0.0.1:9"))
        assert worker.state is WorkerState.STARTING
        await fleet.close()

    asyncio.run(run())
