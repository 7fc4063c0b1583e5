"""Workers that are reached by gRPC: the engine's real service over engines that follow a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from sapwood.app.serving.grpc_server import GrpcServer
from sapwood.frontends.server import create_app
from sapwood.frontends.serving.services import Services
from sapwood.gateway.worker import WorkerState
from sapwood.http.access import Access
from sapwood.schema.config.server import ServerConfig
from sapwood.text.generation import TextGenerator
from sapwood.text.template import ChatTemplate
from sapwood.text.tokenizer import Tokenizer
from tests.frontends.conftest import ScriptedEngine
from tests.frontends.pooling import EMBEDS, PoolingEngine, over, vector_of
from tests.gateway.stubs import Bench, Running, bench
from tests.tiny import write_tokenizer

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    write_tokenizer(made)
    return made


class Engine:
    """An engine behind gRPC, and the same one behind HTTP."""

    def __init__(self, directory: Path, *, key: str | None = None, **script: Any) -> None:
        tokenizer = Tokenizer.from_directory(directory)
        self.script = ScriptedEngine(tokenizer, **script)
        self.services = Services(
            engine=self.script,
            generator=TextGenerator(self.script, tokenizer),
            tokenizer=tokenizer,
            template=ChatTemplate.of_model(tokenizer, override=None, architectures=()),
            model_name="m",
            model_path="m",
            created=0,
            version="0",
        )
        self._key = key

    def app(self) -> Any:
        return create_app(self.services, access=Access(api_key=self._key))

    async def listen(self) -> str:
        config = ServerConfig(port=0, grpc_mode=True, api_key=self._key, drain_timeout=0.0)
        ends = (self.services.tokenizer.eos_token_id or 0,)
        self.server = GrpcServer(self.services, config, lambda: None, eos_token_ids=ends)
        self._served = asyncio.create_task(self.server.serve())
        return self.server.url

    async def kill(self) -> None:
        """As the end of its process would."""
        await self.server._server.stop(None)
        self.server.stop()
        await self._served


@asynccontextmanager
async def fleet(
    directory: Path, *engines: Engine, http: Engine | None = None, **options: Any
) -> AsyncIterator[Bench]:
    """A gateway over these engines by gRPC, and over another one by HTTP."""
    urls = [await engine.listen() for engine in engines]
    app = Running(http.app()) if http is not None else None
    try:
        if app is not None:
            await app.__aenter__()
            urls.append(app.url)
        given = {"tokenizer_path": str(directory), "worker_urls": ",".join(urls)} | options
        async with bench(wait=False, **given) as made:
            for worker in made.gateway.fleet:
                while worker.state is not WorkerState.READY:
                    await asyncio.sleep(0.005)
            yield made
    finally:
        for engine in engines:
            await engine.kill()
        if app is not None:
            await app.__aexit__()


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"messages": HELLO, "stop": ["wö"], "n": 2}),
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 8}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 64, "logprobs": 2}),
    ("/generate", {"text": "Hello", "sampling_params": {"max_new_tokens": 4}}),
    ("/generate", {"input_ids": [72, 105], "return_logprob": True}),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 64}),
    ("/v1/messages/count_tokens", {"messages": HELLO}),
]
_OWN = frozenset({"id", "created", "e2e_latency", "decode_throughput", "queue_time"})


def told(value: Any) -> Any:
    """An answer without what no two answers have in common."""
    if isinstance(value, dict):
        return {name: told(one) for name, one in value.items() if name not in _OWN}
    return [told(one) for one in value] if isinstance(value, list) else value


def events(answer: httpx.Response) -> list[Any]:
    lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: {")]
    return [told(json.loads(line)) for line in lines]


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_answers_are_those_of_the_engine_by_http(
    directory: Path, path: str, body: dict[str, Any]
) -> None:
    async def run() -> None:
        engine, other = Engine(directory), Engine(directory)
        async with Running(other.app()) as direct, fleet(directory, engine) as made:
            async with httpx.AsyncClient(base_url=direct.url, trust_env=False) as client:
                expected = await client.post(path, json={"model": "m", **body})
                answer = await made.post(path, **body)
                assert answer.status_code == expected.status_code == 200, answer.text
                assert told(answer.json()) == told(expected.json())
                streamed = {"model": "m", **body, "stream": True}
                expected = await client.post(path, json=streamed)
                answer = await made.client.post(path, json=streamed)
            assert text_of(events(answer)) == text_of(events(expected))
            assert made.num_open() == 0
        assert len(engine.script.submitted) == len(other.script.submitted)

    asyncio.run(run())


def text_of(told_events: list[Any]) -> str:
    """All the text of a stream, however it was cut into events."""
    text = ""
    for event in told_events:
        if "text" in event:
            text = event["text"]  # the native API tells all of it each time
        for choice in event.get("choices", ()):
            if not choice["index"]:
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        text += event.get("delta", {}).get("text") or ""
    return text


def test_responses_are_made_of_tokens_too(directory: Path) -> None:
    async def run() -> None:
        engine = Engine(directory)
        async with fleet(directory, engine) as made:
            answer = (await made.post("/v1/responses", input="Hello")).json()
            assert answer["status"] == "completed"
            (item,) = answer["output"]
            assert item["content"][0]["text"] == engine.script.reply

    asyncio.run(run())


def test_a_client_that_leaves_aborts_the_call(directory: Path) -> None:
    async def run() -> None:
        engine = Engine(directory, hold_after=3)
        async with fleet(directory, engine) as made:
            with suppress(httpx.ReadTimeout):
                await made.client.post(
                    "/v1/completions", json={"prompt": "Hello", "max_tokens": 64}, timeout=0.3
                )
            while engine.script.open or made.num_open():
                await asyncio.sleep(0.005)
        assert list(engine.script.abandoned.values()) == [3]

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_dead_engine_is_replaced_by_another_one(directory: Path, is_stream: bool) -> None:
    async def run() -> None:
        engines = [Engine(directory, step_s=0.002) for _ in range(2)]
        async with fleet(directory, *engines) as made:

            async def ask() -> str:
                body = {"prompt": "Hello", "max_tokens": 64, "stream": is_stream}
                answer = await made.client.post("/v1/completions", json=body)
                if answer.status_code != 200:
                    return answer.text
                if is_stream:
                    # One that had begun is cut off with an event that says so.
                    return "broke off" if "broke off" in answer.text else text_of(events(answer))
                return str(answer.json()["choices"][0]["text"])

            asked = [asyncio.create_task(ask()) for _ in range(32)]
            while not engines[0].script.open:
                await asyncio.sleep(0.001)
            await engines[0].kill()
            answers = await asyncio.gather(*asked)
            whole = [one for one in answers if one == engines[0].script.reply]
            assert all("broke off" in one for one in answers if one not in whole), answers
            assert len(whole) >= 16
            for _ in range(4):
                assert await ask() == engines[0].script.reply
            assert made.num_open() == 0

    asyncio.run(run())


def test_a_refusal_for_now_sends_the_request_elsewhere(directory: Path) -> None:
    async def run() -> None:
        engines = [Engine(directory, fail_after=0), Engine(directory)]
        async with fleet(directory, *engines) as made:
            for _ in range(4):
                answer = await made.post(prompt="Hello")
                assert answer.status_code == 200
            engines[1].script.fail_after = 2
            engines[0].script.unavailable_reason = "draining"
            answer = await made.post(prompt="Hello")
            assert answer.status_code in (502, 503)
            assert made.num_open() == 0
        assert len(engines[0].script.submitted) >= 2

    asyncio.run(run())


def test_engines_by_grpc_come_before_those_by_http(directory: Path) -> None:
    async def run() -> None:
        engine, other = Engine(directory), Engine(directory, reply="by HTTP")
        async with fleet(directory, engine, http=other) as made:
            for _ in range(3):
                answer = (await made.post(prompt="Hello", max_tokens=64)).json()
                assert answer["choices"][0]["text"] == engine.script.reply
            # What tokens cannot say goes by HTTP.
            counted = await made.post("/tokenize", prompt="Hello")
            assert counted.json()["count"] == 5
            assert (await made.client.get("/get_model_info")).json()["model_path"] == "m"
            assert other.script.submitted == []
            await engine.kill()
            answer = (await made.post(prompt="Hello", max_tokens=64)).json()
            assert answer["choices"][0]["text"] == "by HTTP"
            assert len(other.script.submitted) == 1

    asyncio.run(run())


def test_what_is_asked_of_all_workers(directory: Path) -> None:
    async def run() -> None:
        engine = Engine(directory, hold_after=2)
        async with fleet(directory, engine) as made:
            (card,) = (await made.client.get("/v1/models")).json()["data"]
            assert (card["id"], card["max_model_len"]) == ("m", 1024)
            flushed = (await made.client.post("/flush_cache")).json()
            assert (flushed["done"], flushed["failed"]) == ([engine.server.url], {})
            (one,) = (await made.client.get("/get_loads")).json()["workers"]
            assert one["told"]["loads"][0]["max_total_num_tokens"] == 4096
            asked = asyncio.create_task(made.post("/generate", text="Hello", rid="mine"))
            while not engine.script.held:
                await asyncio.sleep(0.005)
            aborted = await made.client.post("/abort_request", json={"rid": "mine"})
            assert aborted.status_code == 200
            reason = (await asked).json()["meta_info"]["finish_reason"]
            assert reason["type"] == "abort"
            refused = await made.client.post("/abort_request", json={"abort_all": True})
            assert refused.status_code == 502

    asyncio.run(run())


def test_health_is_asked_for_by_grpc(directory: Path) -> None:
    async def run() -> None:
        engine = Engine(directory)
        options = {"health_check_interval_secs": 0.02, "health_failure_threshold": 2}
        async with fleet(directory, engine, **options, health_success_threshold=1) as made:
            (worker,) = made.gateway.fleet
            engine.script.unavailable_reason = "out of order"
            while worker.state is not WorkerState.UNHEALTHY:
                await asyncio.sleep(0.005)
            assert (await made.post(prompt="Hello")).status_code == 503
            engine.script.unavailable_reason = None
            while worker.state is not WorkerState.READY:
                await asyncio.sleep(0.005)
            assert (await made.post(prompt="Hello")).status_code == 200

    asyncio.run(run())


def test_requests_without_an_answer_go_elsewhere_when_the_engine_is_given_up(
    directory: Path,
) -> None:
    async def run() -> None:
        engines = [Engine(directory, hold=True), Engine(directory)]
        options = {"health_check_interval_secs": 0.02, "health_failure_threshold": 1}
        async with fleet(directory, *engines, **options, retry_max_retries=5) as made:
            asked = [asyncio.create_task(made.post(prompt="Hello")) for _ in range(4)]
            while not engines[0].script.held:
                await asyncio.sleep(0.005)
            engines[0].script.unavailable_reason = "hangs"
            assert [one.status_code for one in await asyncio.gather(*asked)] == [200] * 4
        assert len(engines[1].script.submitted) == 4

    asyncio.run(run())


def test_keys_go_along(directory: Path) -> None:
    async def run() -> None:
        engine = Engine(directory, key="secret")
        async with fleet(directory, engine, worker_api_key="secret") as made:
            assert (await made.post(prompt="Hello")).status_code == 200
        engine = Engine(directory, key="secret")
        async with fleet(directory, engine) as made:
            assert (await made.post(prompt="Hello")).status_code == 401
            key = {"authorization": "Bearer secret"}
            assert (await made.post(prompt="Hello", headers=key)).status_code == 200

    asyncio.run(run())


def test_embeddings_by_grpc(directory: Path) -> None:
    async def run() -> None:
        engine = Engine(directory)
        encode = engine.services.tokenizer.encode
        engine.services = over(engine.services, PoolingEngine(), EMBEDS)
        async with fleet(directory, engine) as made:
            answer = await made.post("/v1/embeddings", input=["oak", "elm"])
            first, second = answer.json()["data"]
            assert first["embedding"] == pytest.approx(vector_of(encode("oak")).tolist())
            assert second["embedding"] == pytest.approx(vector_of(encode("elm")).tolist())
            refused = await made.post("/v1/embeddings", input="oak", dimensions=2)
            assert (refused.status_code, "dimensions" in refused.text) == (400, True)
            refused = await made.post(prompt="Hello")
            assert (refused.status_code, "generates no text" in refused.text) == (400, True)

    asyncio.run(run())


def test_what_is_not_possible_is_refused_with_the_way_out(directory: Path) -> None:
    async def run() -> None:
        engine = Engine(directory)
        async with fleet(directory, engine) as made:
            for path, body, way_out in (
                ("/v1/completions", {"prompt": "Hello", "seed": 3}, "seed"),
                ("/v1/completions", {"prompt": "Hello", "priority": 3}, "priority"),
                ("/v1/completions", {"prompt": "Hello", "top_p": 7}, "top_p"),
                ("/v1/rerank", {"query": "a", "documents": ["b"]}, "by HTTP"),
                ("/v1/completions", {"model": "m:none", "prompt": "Hello"}, "LoRA"),
            ):
                refused = await made.post(path, **body)
                assert refused.status_code == 400, refused.text
                assert way_out in refused.text
            for wrong in (
                {"url": "grpc://h:1", "worker_type": "decode"},
                {"url": "grpc://h:1", "runtime": "vllm"},
                {"url": "grpc://h:1/path"},
                {"url": "grpc://h"},
            ):
                refused = await made.client.post("/workers", json=wrong)
                assert refused.status_code == 400, refused.text
        async with fleet(directory, Engine(directory), tokenizer_path=None) as made:
            for path, body in (
                ("/v1/completions", {"prompt": "Hello"}),
                ("/v1/chat/completions", {"messages": HELLO}),
                ("/v1/responses", {"input": "Hello"}),
            ):
                refused = await made.post(path, **body)
                assert (refused.status_code, "--tokenizer-path" in refused.text) == (400, True)

    asyncio.run(run())


def test_an_adapter_is_named_by_the_model(directory: Path) -> None:
    async def run() -> None:
        engine = Engine(directory)
        known: list[str] = []

        class Adapters:
            is_on = True

            def check(self, name: str, param: str) -> str:
                known.append(name)
                return ""

            def knows(self, name: str) -> bool:
                return False

        engine.services = replace(engine.services, adapters=Adapters())  # type: ignore[arg-type]
        async with fleet(directory, engine) as made:
            answer = await made.post(model="m:poems", prompt="Hello")
            assert (answer.status_code, answer.json()["model"]) == (200, "m:poems")
            unknown = await made.post(model="other", prompt="Hello")
            assert unknown.status_code in (400, 404)
        assert known == ["poems"]

    asyncio.run(run())
