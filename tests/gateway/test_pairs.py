"""Requests that two workers answer: one reads the prompt, the other one generates."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.base.errors import ConfigError, InvalidRequest
from sapwood.gateway.pairs import MAX_ROOMS, num_rooms
from sapwood.gateway.worker import WorkerState
from sapwood.schema.config.gateway import GatewayConfig
from tests.gateway.stubs import Asked, Bench, Running, Stub, bench


class Engine(Stub):
    """An engine of SGLang's as far as a gateway sees it; told how many tokens its prompts have."""

    def __init__(self, name: str, logprobs: list[float]) -> None:
        super().__init__(name)
        self.logprobs = logprobs

    def _output(self, index: int) -> dict[str, Any]:
        told = [[logprob, index, None] for logprob in self.logprobs]
        meta = {"input_token_logprobs": told, "completion_tokens": 1}
        return {"text": self.name, "index": index, "meta_info": meta}

    def answer(self, asked: Asked) -> object:
        text = json.loads(asked.body or b"{}").get("text")
        if isinstance(text, list):
            return [self._output(index) for index in range(len(text))]
        return self._output(0)

    def events(self, asked: Asked) -> list[bytes]:
        text = json.loads(asked.body or b"{}").get("text")
        num = len(text) if isinstance(text, list) else 1
        return [
            b"data: %s\n\n" % json.dumps(self._output(n % num)).encode() for n in range(2 * num)
        ]


@asynccontextmanager
async def pairs(*engines: tuple[str, Stub, int | None], **options: Any) -> AsyncIterator[Bench]:
    """A gateway over engines (type, stub, bootstrap port), all ready."""
    options = {"policy": "round_robin", "pd_disaggregation": True} | options
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(Running(stub)) for _, stub, _ in engines]
        told: dict[str, list[str]] = {"prefill": [], "decode": []}
        for (kind, stub, port), served in zip(engines, running, strict=True):
            stub.url = served.url
            told[kind] += [served.url, *([] if port is None else [str(port)])]
        words = {kind: " ".join(parts) for kind, parts in told.items()}
        made = await stack.enter_async_context(bench(wait=False, **words, **options))
        made.stubs += [stub for _, stub, _ in engines]
        made.engines += running
        await made.until(WorkerState.READY)
        yield made


def fields(stub: Stub) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(stub.posts[-1].body)
    return told


def test_both_are_told_where_they_meet_and_the_client_gets_what_is_generated() -> None:
    async def run() -> None:
        first, second = Engine("reads", []), Engine("generates", [])
        async with pairs(("prefill", first, 8998), ("decode", second, None)) as made:
            answer = await made.client.post(
                "/v1/chat/completions",
                json={"messages": [], "bootstrap_host": "evil", "bootstrap_room": 0},
                headers={"x-request-id": "mine"},
            )
            assert answer.json()["text"] == "generates"
            assert answer.headers["x-request-id"] == "mine"
            assert first.posts[0].body == second.posts[0].body
            told = fields(first)
            assert (told["bootstrap_host"], told["bootstrap_port"]) == ("127.0.0.1", 8998)
            assert 0 < told["bootstrap_room"] < 2**63
            rooms = set()
            for _ in range(3):
                await made.post("/generate", text="a")
                rooms.add(fields(second)["bootstrap_room"])
            assert len(rooms | {told["bootstrap_room"]}) == 4
            assert made.num_open() == 0
            text = made.gateway.metrics.exposition().decode()
            for stub in (first, second):
                line = f'selection_total{{policy="round_robin",worker="{stub.url}"}} 4.0'
                assert line in text

    asyncio.run(run())


def test_pairs_are_chosen_by_two_policies() -> None:
    async def run() -> None:
        readers = [Engine("a", []), Engine("b", [])]
        generators = [Engine("c", []), Engine("d", [])]
        engines = [("prefill", one, None) for one in readers]
        engines += [("decode", one, None) for one in generators]
        async with pairs(*engines, prefill_policy="consistent_hashing") as made:
            texts = []
            for _ in range(4):
                told = await made.post("/generate", text="x", headers={"x-smg-routing-key": "k"})
                texts.append(told.json()["text"])
            assert sorted(texts) == ["c", "c", "d", "d"]
            assert sorted(len(one.posts) for one in readers) == [0, 4]
            assert fields(generators[0])["bootstrap_port"] is None

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("is_batch", [False, True])
def test_log_probabilities_of_the_prompt_are_merged(is_stream: bool, is_batch: bool) -> None:
    async def run() -> None:
        first, second = Engine("reads", [-1.0, -2.0]), Engine("generates", [-3.0])
        async with pairs(("prefill", first, 1), ("decode", second, None)) as made:
            text = ["a", "b"] if is_batch else "a"
            told = await made.post("/generate", text=text, return_logprob=True, stream=is_stream)
            assert "accept-encoding" not in second.posts[0].headers
            if is_stream:
                lines = [line for line in told.text.split("\n\n") if line]
                assert lines.pop() == "data: [DONE]"
                outputs = [json.loads(line.removeprefix("data: ")) for line in lines]
                assert len(outputs) == (4 if is_batch else 2)
            else:
                outputs = told.json() if is_batch else [told.json()]
            for output in outputs:
                merged = output["meta_info"]["input_token_logprobs"]
                assert merged == [[logprob, output["index"], None] for logprob in (-1, -2, -3)]
                assert output["text"] == "generates"
            if is_batch:
                assert len(set(fields(first)["bootstrap_room"])) == 2
                assert fields(first)["bootstrap_port"] == [1, 1]
            assert made.num_open() == 0

    asyncio.run(run())


def test_log_probabilities_that_break_off_are_a_failure() -> None:
    async def run() -> None:
        first, second = Engine("reads", [-1.0]), Engine("generates", [])
        first.behaviour = "cut"
        async with pairs(("prefill", first, 1), ("decode", second, None)) as made:
            fields = {"text": "a", "return_logprob": True, "stream": True}
            told = await made.post("/generate", **fields)
            assert told.status_code == 502
            assert len(second.posts) > 1
            assert made.gateway.metrics.num_failures(made.worker(first)) == len(first.posts)
            assert made.gateway.metrics.num_failures(made.worker(second)) == 0
            while made.num_open():
                await asyncio.sleep(0.005)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_failure_of_either_ends_both_and_another_pair_is_asked(kind: str) -> None:
    async def run() -> None:
        bad, good = Engine("bad", []), Engine("good", [])
        other = Engine("other", [])
        other_kind = "decode" if kind == "prefill" else "prefill"
        engines = [(kind, bad, None), (kind, good, None), (other_kind, other, None)]
        async with pairs(*engines) as made:
            bad.behaviour = 503
            other.behaviour = "ok"
            for _ in range(2):
                assert (await made.post("/generate", text="a")).status_code == 200
            assert bad.posts
            while made.num_open():
                await asyncio.sleep(0.005)
            # The worker that waited in vain is not to blame.
            assert made.gateway.metrics.num_failures(made.worker(other)) == 0

    asyncio.run(run())


def test_a_refusal_by_either_reaches_the_client_while_the_other_one_waits() -> None:
    async def run() -> None:
        for refuses in (0, 1):
            engines = [Engine("reads", []), Engine("generates", [])]
            engines[refuses].behaviour = 400
            engines[1 - refuses].behaviour = "hang"
            async with pairs(("prefill", engines[0], 1), ("decode", engines[1], None)) as made:
                told = await made.post("/generate", text="a")
                assert (told.status_code, told.json()["error"]["message"]) == (400, "told to fail")
                while not engines[1 - refuses].num_left or made.num_open():
                    await asyncio.sleep(0.005)

    asyncio.run(run())


def test_an_answer_ends_when_its_prompt_is_not_read_to_the_end() -> None:
    async def run() -> None:
        first, second = Engine("reads", []), Engine("generates", [])
        first.behaviour, second.behaviour = "cut_event", "wait"
        async with pairs(("prefill", first, 1), ("decode", second, None)) as made:
            told = await made.post("/generate", text="a", stream=True)
            *_, last = [line for line in told.text.split("\n\n") if line]
            assert (
                "reads the prompt failed"
                in json.loads(last.removeprefix("data: "))["error"]["message"]
            )
            metrics = made.gateway.metrics
            assert metrics.num_failures(made.worker(first)) == 1
            assert metrics.num_failures(made.worker(second)) == 0
            while made.num_open():
                await asyncio.sleep(0.005)

    asyncio.run(run())


def test_a_client_that_leaves_ends_both() -> None:
    async def run() -> None:
        first, second = Engine("reads", []), Engine("generates", [])
        first.behaviour = second.behaviour = "wait"
        async with pairs(("prefill", first, 1), ("decode", second, None)) as made:
            async with made.client.stream(
                "POST", "/generate", json={"text": "a", "stream": True}
            ) as answer:
                await anext(answer.aiter_bytes())
            while not (first.num_left and second.num_left) or made.num_open():
                await asyncio.sleep(0.005)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/embeddings", {"input": "a"}, "/v1/embeddings is not served"),
        ("/v1/responses", {"input": "a"}, "/v1/responses is not served"),
        ("/v1/classify", {"input": "a"}, "/v1/classify is not served"),
        ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ("/generate", {"text": "a", "sampling_params": {"n": MAX_ROOMS + 1}}, str(MAX_ROOMS)),
        ("/generate", [], "object"),
    ],
)
def test_what_pairs_cannot_do_is_refused(path: str, body: object, named: str) -> None:
    async def run() -> None:
        first, second = Engine("reads", []), Engine("generates", [])
        async with pairs(("prefill", first, 1), ("decode", second, None)) as made:
            told = await made.client.post(path, json=body)
            assert told.status_code == 400
            assert named in told.text
            assert not first.posts + second.posts

    asyncio.run(run())


def test_a_pair_is_healthy_if_both_generate() -> None:
    async def run() -> None:
        first, second = Engine("reads", []), Engine("generates", [])
        async with pairs(
            ("prefill", first, 1), ("decode", second, None), disable_retries=True
        ) as made:
            assert (await made.client.get("/health_generate")).status_code == 200
            assert [len(one.asked) for one in (first, second)] == [1, 1]
            first.behaviour = 503
            assert (await made.client.get("/health_generate")).status_code == 503

    asyncio.run(run())


def test_a_gateway_is_ready_when_there_is_a_pair() -> None:
    async def run() -> None:
        first, second = Engine("reads", []), Engine("generates", [])
        async with pairs(("prefill", first, 1)) as made, Running(second) as engine:
            assert (await made.client.get("/readiness")).json()["status"].startswith("no pair")
            told = await made.post("/generate", text="a")
            assert told.status_code == 503
            assert "no decode worker" in told.text
            # One worker is enough for this.
            assert (await made.post("/tokenize", prompt="a")).json()["text"] == "reads"
            for body, status in (
                ({"url": engine.url}, 400),
                ({"url": engine.url, "worker_type": "decode", "bootstrap_port": 1}, 400),
                ({"url": engine.url, "worker_type": "decode", "runtime": "vllm"}, 400),
                ({"url": engine.url, "worker_type": "decode"}, 202),
            ):
                added = await made.client.post("/workers", json=body)
                assert added.status_code == status, added.text
            second.url = engine.url
            await made.until(WorkerState.READY, second)
            assert (await made.client.get("/readiness")).status_code == 200
            assert (await made.post("/generate", text="a")).json()["text"] == "generates"
            figures: httpx.Response = await made.client.get("/dashboard/figures")
            assert figures.json()["state"] == "ready"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body", "rooms"),
    [
        ("/generate", {"text": "a"}, None),
        ("/generate", {"text": ["a"]}, 1),
        ("/generate", {"text": ["a", "b"], "sampling_params": {"n": 3}}, 6),
        ("/generate", {"input_ids": [1, 2]}, None),
        ("/generate", {"input_ids": [[1], [2]], "sampling_params": [{}, {}]}, 2),
        ("/v1/completions", {"prompt": [1, 2]}, None),
        ("/v1/completions", {"prompt": [[1], [2]]}, 2),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}, 4),
        ("/v1/chat/completions", {"messages": [], "n": 2}, 2),
        ("/v1/chat/completions", {"messages": [], "n": "x"}, None),
    ],
)
def test_each_sequence_has_a_room(path: str, body: object, rooms: int | None) -> None:
    told = msgspec.json.decode(json.dumps(body), type=dict[str, msgspec.Raw])
    assert num_rooms(path, told) == rooms


@given(
    st.dictionaries(
        st.sampled_from(["text", "input_ids", "prompt", "n", "sampling_params"]),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["n", "x"]), inner),
            max_leaves=8,
        ),
    )
)
def test_any_request_has_some_rooms_or_is_refused(body: dict[str, object]) -> None:
    told = msgspec.json.decode(json.dumps(body), type=dict[str, msgspec.Raw])
    for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
        try:
            rooms = num_rooms(path, told)
        except InvalidRequest:
            continue
        assert rooms is None or 1 <= rooms <= MAX_ROOMS


def test_options() -> None:
    config = GatewayConfig(
        pd_disaggregation=True, prefill="http://a\n8998\nhttp://b, http://c none", decode="http://d"
    )
    assert config.prefill_workers == (("http://a", 8998), ("http://b", None), ("http://c", None))
    assert config.decode_urls == ("http://d",)
    for options, named in (
        ({"pd_disaggregation": True, "prefill": "8998"}, "8998"),
        ({"pd_disaggregation": True, "prefill": "http://a 1 2"}, "2"),
        ({"pd_disaggregation": True, "prefill": "http://a 99999"}, "99999"),
        ({"pd_disaggregation": True, "worker_urls": "http://a"}, "--worker-urls"),
        ({"decode": "http://a"}, "--pd-disaggregation"),
        ({"prefill_policy": "random"}, "--prefill-policy"),
    ):
        with pytest.raises(ConfigError, match=named):
            GatewayConfig(**options)
