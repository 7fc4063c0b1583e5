"""The gRPC service around an engine that answers from a script, asked by SGLang's own stubs."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from sapwood.app.serving.grpc_server import GrpcServer
from sapwood.frontends.serving.limits import RequestLimits
from sapwood.frontends.serving.services import Services
from sapwood.rpc import health_pb2
from sapwood.rpc.methods import CHECK, SCHEDULER, WATCH
from sapwood.schema.config.server import ServerConfig
from sapwood.text.tokenizer import Tokenizer
from tests.frontends.conftest import ScriptedEngine
from tests.frontends.pooling import EMBEDS, SIZE, PoolingEngine, classifies, over, vector_of

with warnings.catch_warnings():
    # They were made by an older protoc than the runtime's.
    warnings.simplefilter("ignore")
    from smg_grpc_proto import sglang_scheduler_pb2 as pb
    from smg_grpc_proto import sglang_scheduler_pb2_grpc as stubs
    from smg_grpc_proto.generated import common_pb2 as common

LIMIT_S = 60.0
Status = grpc.StatusCode


class Client:
    def __init__(self, channel: grpc.aio.Channel, server: GrpcServer) -> None:
        self.channel = channel
        self.server = server
        self.stub = stubs.SglangSchedulerStub(channel)

    async def generate(self, metadata: Any = None, **fields: Any) -> list[Any]:
        return await collected(self.stub.Generate(asked(**fields), metadata=metadata))


async def collected(call: Any) -> list[Any]:
    return [one async for one in call]


def asked(text: str = "Hello", **fields: Any) -> Any:
    sampling = {"max_new_tokens": 64} | fields.pop("sampling", {})
    given = {
        "tokenized": pb.TokenizedInput(original_text="not read", input_ids=list(text.encode())),
        "sampling_params": pb.SamplingParams(**sampling),
    }
    return pb.GenerateRequest(**given | fields)


@asynccontextmanager
async def serving(
    services: Services, drain: Callable[[], None] = lambda: None, **options: Any
) -> AsyncIterator[Client]:
    server = GrpcServer(
        services, ServerConfig(port=0, grpc_mode=True, **options), drain, eos_token_ids=(257,)
    )
    served = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(LIMIT_S):
            async with grpc.aio.insecure_channel(server.url.removeprefix("grpc://")) as channel:
                yield Client(channel, server)
    finally:
        server.stop()
        await served


def run(services: Services, test: Callable[[Client], Awaitable[None]], **options: Any) -> None:
    async def whole() -> None:
        async with serving(services, **options) as client:
            await test(client)

    asyncio.run(whole())


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), str(error.value.details())


def test_tokens_come_as_deltas_and_all_again_at_the_end(
    services: Services, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    engine.num_cached_tokens = 3
    ids = tokenizer.encode(engine.reply + "<|im_end|>")

    async def test(client: Client) -> None:
        *chunks, last = await client.generate(stream=True, request_id="mine")
        assert [one.request_id for one in chunks] == ["mine"] * len(ids)
        assert [list(one.chunk.token_ids) for one in chunks] == [[one] for one in ids]
        assert [one.chunk.completion_tokens for one in chunks] == list(range(1, len(ids) + 1))
        assert {(one.chunk.prompt_tokens, one.chunk.cached_tokens) for one in chunks} == {(5, 3)}
        whole = last.complete
        assert (list(whole.output_ids), whole.finish_reason) == (ids, "stop")
        assert whole.matched_token_id == ids[-1]
        assert (whole.prompt_tokens, whole.completion_tokens) == (5, len(ids))
        (alone,) = await client.generate()
        assert alone.complete == whole

    run(services, test)
    assert engine.submitted[0].prompt_ids == list(b"Hello")
    assert engine.submitted[0].request_id == "mine"


def test_each_sample_has_its_index_and_a_limit_ends_it(
    services: Services, engine: ScriptedEngine
) -> None:
    async def test(client: Client) -> None:
        told = await client.generate(sampling={"n": 3, "max_new_tokens": 2})
        assert sorted(one.complete.index for one in told) == [0, 1, 2]
        assert {one.complete.finish_reason for one in told} == {"length"}
        streamed = await client.generate(
            stream=True, sampling={"n": 2, "max_new_tokens": 4, "stream_interval": 2}
        )
        chunks = [one.chunk for one in streamed if one.HasField("chunk")]
        assert (
            sorted((one.index, len(one.token_ids)) for one in chunks) == [(0, 2)] * 2 + [(1, 2)] * 2
        )
        assert len(streamed) == len(chunks) + 2

    run(services, test)


def test_a_stop_string_ends_the_output_and_is_named(
    services: Services, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    async def test(client: Client) -> None:
        (told,) = await client.generate(sampling={"stop": ["lo, w"]})
        assert told.complete.matched_stop_str == "lo, w"
        assert told.complete.finish_reason == "stop"
        assert tokenizer.decode(list(told.complete.output_ids)) == "Hello, w"

    run(services, test)
    assert list(engine.abandoned.values()) == [8]


def test_log_probabilities_of_prompt_and_output(services: Services) -> None:
    fields = {
        "return_logprob": True,
        "logprob_start_len": 1,
        "top_logprobs_num": 2,
        "token_ids_logprob": [7, 9],
    }

    async def test(client: Client) -> None:
        (told,) = await client.generate(sampling={"max_new_tokens": 3}, **fields)
        output, prompt = told.complete.output_logprobs, told.complete.input_logprobs
        assert list(output.token_ids) == list(told.complete.output_ids)
        assert len(output.token_logprobs) == 3
        assert [len(one.values) for one in output.top_logprobs] == [2] * 3
        assert [list(one.token_ids) for one in output.token_ids_logprobs] == [[7, 9]] * 3
        assert list(prompt.token_ids) == list(b"ello")
        assert [one.HasField("value") for one in prompt.token_logprobs] == [False] + [True] * 3
        assert [len(one.values) for one in prompt.top_logprobs] == [0, 2, 2, 2]

        *chunks, last = await client.generate(stream=True, sampling={"max_new_tokens": 3}, **fields)
        parts = [one.chunk for one in chunks]
        values = [value for one in parts for value in one.output_logprobs.token_logprobs]
        assert values == list(output.token_logprobs)
        assert [one.HasField("input_logprobs") for one in parts] == [True, False, False]
        assert parts[0].input_logprobs == prompt
        assert not last.complete.HasField("output_logprobs")
        # Without return_logprob the other fields ask for nothing.
        (plain,) = await client.generate(top_logprobs_num=2)
        assert not plain.complete.HasField("output_logprobs")

    run(services, test)


def test_parameters_reach_the_engine_and_zeros_mean_the_defaults(
    services: Services, engine: ScriptedEngine
) -> None:
    given = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.1,
        "stop_token_ids": [3, 4],
        "min_new_tokens": 1,
        "logit_bias": {"17": 1.5},
        "json_schema": '{"type": "object"}',
    }

    async def test(client: Client) -> None:
        await client.generate(sampling=given)
        await client.generate(sampling={"max_new_tokens": 1})
        await client.generate(
            custom_logit_processor="x", sampling={"custom_params": {"a": [1, 2.5, "b"]}}
        )

    plain = replace(services)
    plain.generator._logits_processors = ["x"]
    run(plain, test)
    sampling = engine.submitted[0].options.sampling
    for name, value in given.items():
        if name not in ("json_schema", "logit_bias", "stop_token_ids"):
            assert getattr(sampling, name) == value
    assert (sampling.logit_bias, sampling.stop_token_ids) == ({17: 1.5}, (3, 4))
    assert sampling.grammar is not None
    assert sampling.grammar.kind == "json_schema"
    default = engine.submitted[1].options.sampling
    assert (default.temperature, default.top_p, default.top_k) == (0.0, 1.0, -1)
    assert (default.repetition_penalty, default.grammar, default.stop) == (1.0, None, ())
    assert engine.submitted[2].options.sampling.custom_params == {"a": [1, 2.5, "b"]}


def test_what_cannot_be_honoured_is_refused_by_name(
    services: Services, engine: ScriptedEngine
) -> None:
    nothing = pb.SamplingParams()
    refused: list[tuple[str, dict[str, Any]]] = [
        ("mm_inputs", {"mm_inputs": pb.MultimodalInputs(image_urls=["x"])}),
        ("disaggregated_params", {"disaggregated_params": pb.DisaggregatedParams()}),
        ("input_embeds", {"input_embeds": [0.5]}),
        ("return_hidden_states", {"return_hidden_states": True}),
        ("require_reasoning", {"require_reasoning": True}),
        ("tokenized", {"tokenized": pb.TokenizedInput()}),
        ("context length", {"tokenized": pb.TokenizedInput(input_ids=[1] * 4096)}),
        ("the token id 9999", {"tokenized": pb.TokenizedInput(input_ids=[9999])}),
        ("LoRA", {"lora_id": "x"}),
        ("data_parallel_rank", {"data_parallel_rank": 7}),
        ("logprob_start_len", {"return_logprob": True, "logprob_start_len": -2}),
        ("token_ids_logprob", {"return_logprob": True, "token_ids_logprob": [1] * 5000}),
        ("custom_logit_processor", {"custom_logit_processor": "none such"}),
        ("top_p", {"sampling": {"top_p": 1.5}}),
        ("temperature", {"sampling": {"temperature": float("nan")}}),
        ("n is 1000", {"sampling": {"n": 1000}}),
        ("logit_bias", {"sampling": {"logit_bias": {"-1": 1.0}}}),
        ("stop_token_ids", {"sampling": {"stop_token_ids": [2**31]}}),
        ("stop has 2000", {"sampling": {"stop": ["x"] * 2000}}),
        ("json_schema", {"sampling": {"json_schema": "{"}}),
        ("custom_params", {"sampling": {"custom_params": {"a": 1}}}),
    ]

    async def test(client: Client) -> None:
        for name, fields in refused:
            code, details = await refusal(client.generate(**fields))
            assert code is Status.INVALID_ARGUMENT, (name, details)
            assert name in details
        code, details = await refusal(client.stub.Embed(pb.EmbedRequest(sampling_params=nothing)))
        assert (code, "embeddings" in details) == (Status.INVALID_ARGUMENT, True)
        code, _ = await refusal(collected(client.stub.GetTokenizer(common.GetTokenizerRequest())))
        assert code is Status.UNIMPLEMENTED
        (told,) = await client.generate()
        assert told.complete.finish_reason == "stop"

    run(services, test)
    assert len(engine.submitted) == 1


def test_bytes_that_are_no_message_and_messages_that_are_too_long(services: Services) -> None:
    async def test(client: Client) -> None:
        raw = client.channel.unary_stream(f"/{SCHEDULER}/Generate")
        for hostile in (b"\xff" * 64, b"\x12\xff\xff\xff\xff\x0f", b"\x0a\x80"):
            code, _ = await refusal(collected(raw(hostile)))
            assert code is Status.INVALID_ARGUMENT
        code, details = await refusal(client.generate(text="x" * 100_000))
        assert (code, "larger than max" in details) == (Status.RESOURCE_EXHAUSTED, True)
        value = b"\x20\x01"
        for _ in range(3000):  # a list in a list
            value = _field(6, _field(1, value))
        custom = _field(1, _field(1, b"a") + _field(2, value))
        deep = _field(2, _field(2, b"A")) + _field(4, _field(23, custom))
        code, _ = await refusal(collected(raw(deep)))
        assert code is Status.INVALID_ARGUMENT
        assert len(await client.generate()) == 1

    run(services, test, max_request_bytes=65_536)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    told = b""
    while number > 127:
        told += bytes([number % 128 | 128])
        number //= 128
    return told + bytes([number])


def test_a_client_that_leaves_aborts_its_request(
    services: Services, engine: ScriptedEngine
) -> None:
    engine.hold_after = 2

    async def test(client: Client) -> None:
        call = client.stub.Generate(asked(stream=True, request_id="left"))
        await call.read()
        await call.read()
        assert list(engine.open) == ["left"]
        call.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in client.stub.Generate(asked(request_id="late"), timeout=0.2):
                pass
        assert error.value.code() is Status.DEADLINE_EXCEEDED
        while engine.open:
            await asyncio.sleep(0.005)

    run(services, test)
    assert set(engine.abandoned) == {"left", "late"}


def test_an_aborted_request_is_answered(services: Services, engine: ScriptedEngine) -> None:
    engine.hold_after = 2

    async def test(client: Client) -> None:
        call = client.stub.Generate(asked(request_id="mine"))
        while not engine.held:
            await asyncio.sleep(0.005)
        code, details = await refusal(client.generate(request_id="mine"))
        assert (code, "still open" in details) == (Status.INVALID_ARGUMENT, True)
        assert not (await client.stub.Abort(pb.AbortRequest(request_id="min"))).success
        assert (await client.stub.Abort(pb.AbortRequest(request_id="mine"))).success
        (told,) = [one async for one in call]
        assert told.complete.finish_reason == "abort"
        code, _ = await refusal(client.stub.Abort(pb.AbortRequest()))
        assert code is Status.INVALID_ARGUMENT

    run(services, test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_engine_is_a_status(
    services: Services, engine: ScriptedEngine, stream: bool
) -> None:
    engine.fail_after = 2

    async def test(client: Client) -> None:
        code, details = await refusal(client.generate(stream=stream))
        assert (code, details) == (Status.UNAVAILABLE, "out of pages")

    run(services, test)


def test_a_bug_is_no_secret_told(
    services: Services, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(client: Client) -> None:
        engine.reply = None  # type: ignore[assignment]
        code, details = await refusal(client.generate())
        assert (code, "NoneType" in details) == (Status.INTERNAL, False)
        engine.reply = "ok"
        assert len(await client.generate()) == 1

    run(services, test)
    assert "NoneType" in caplog.text


def test_health_follows_the_engine(services: Services, engine: ScriptedEngine) -> None:
    states = health_pb2.HealthCheckResponse

    async def test(client: Client) -> None:
        check = client.channel.unary_unary(
            CHECK.path, CHECK.asked.SerializeToString, CHECK.answer.FromString
        )
        watch = client.channel.unary_stream(
            WATCH.path, WATCH.asked.SerializeToString, WATCH.answer.FromString
        )(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == states.SERVING
        engine.unavailable_reason = "starting"
        assert (await watch.read()).status == states.NOT_SERVING
        told = await client.stub.HealthCheck(pb.HealthCheckRequest())
        assert (told.healthy, told.message) == (False, "starting")
        for service in ("", SCHEDULER):
            answer = await check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == states.NOT_SERVING
        code, _ = await refusal(check(health_pb2.HealthCheckRequest(service="other")))
        assert code is Status.NOT_FOUND
        for call in (client.generate(), client.stub.GetModelInfo(pb.GetModelInfoRequest())):
            code, details = await refusal(call)
            assert (code, "starting" in details) == (Status.UNAVAILABLE, True)
        engine.unavailable_reason = None
        assert (await watch.read()).status == states.SERVING
        assert (await client.stub.HealthCheck(pb.HealthCheckRequest())).healthy
        client.server.stop()
        assert await watch.read() is grpc.aio.EOF

    run(services, test)


def test_what_it_says_of_model_and_server(services: Services, engine: ScriptedEngine) -> None:
    engine.figures = {"num_waiting": 3, "num_pages": 256, "num_leased_pages": 64}
    services = replace(
        services, default_sampling={"temperature": 0.6}, architectures=("A",), model_type="a"
    )

    async def test(client: Client) -> None:
        model = await client.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (model.served_model_name, model.model_path) == ("org/tiny", "/models/tiny")
        assert (model.max_context_length, model.vocab_size) == (1024, 258)
        assert (list(model.eos_token_ids), list(model.architectures)) == ([257], ["A"])
        assert model.default_sampling_params_json == '{"temperature": 0.6}'
        assert model.is_generation
        server = await client.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert server.server_args["max_running_requests"] == 8
        assert (server.server_type, server.max_total_num_tokens) == ("grpc", 4096)
        assert server.start_time.seconds == 1_700_000_000
        loads = await client.stub.GetLoads(pb.GetLoadsRequest())
        (one,) = loads.loads
        assert (one.num_waiting_reqs, one.num_used_tokens, one.token_usage) == (3, 1024, 0.25)
        assert one.memory.token_capacity == 4096
        assert loads.aggregate.total_waiting_reqs == 3
        core = await client.stub.GetLoads(pb.GetLoadsRequest(include=["core"], dp_rank=0))
        assert not core.loads[0].HasField("memory")
        for wrong in ({"include": ["none such"]}, {"dp_rank": 5}):
            code, _ = await refusal(client.stub.GetLoads(pb.GetLoadsRequest(**wrong)))
            assert code is Status.INVALID_ARGUMENT
        flushed = await client.stub.FlushCache(common.FlushCacheRequest())
        assert (flushed.success, flushed.message) == (True, "flushed")
        code, _ = await refusal(client.stub.FlushCache(common.FlushCacheRequest(timeout_s=1.0)))
        assert code is Status.INVALID_ARGUMENT

    run(services, test)


def test_embeddings_are_vectors_of_the_prompt(services: Services) -> None:
    ids = list(b"oak")

    async def test(client: Client) -> None:
        request = pb.EmbedRequest(tokenized=pb.TokenizedInput(input_ids=ids))
        told = await client.stub.Embed(request)
        assert (told.embedding_dim, told.prompt_tokens) == (SIZE, 3)
        assert list(told.embedding) == vector_of(ids).tolist()
        code, details = await refusal(client.generate())
        assert (code, "generates no text" in details) == (Status.INVALID_ARGUMENT, True)
        request.token_type_ids.append(1)
        code, details = await refusal(client.stub.Embed(request))
        assert (code, "token_type_ids" in details) == (Status.INVALID_ARGUMENT, True)
        model = await client.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert not model.is_generation

    run(over(services, PoolingEngine(), EMBEDS), test)


def test_class_scores_come_by_the_same_method(services: Services) -> None:
    async def test(client: Client) -> None:
        told = await client.stub.Embed(pb.EmbedRequest(tokenized=asked().tokenized))
        assert told.embedding_dim == 2
        model = await client.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (model.num_labels, model.id2label_json) == (2, '{"0": "no", "1": "yes"}')

    run(over(services, PoolingEngine(num_values=2), classifies("no", "yes")), test)


def test_keys_come_as_metadata(services: Services) -> None:
    user = [("authorization", "Bearer user")]
    boss = [("x-api-key", "boss")]

    async def test(client: Client) -> None:
        flush = client.stub.FlushCache
        assert (await client.stub.HealthCheck(pb.HealthCheckRequest())).healthy
        for metadata in (None, [("authorization", "Bearer wrong")], [("authorization", "user")]):
            code, _ = await refusal(client.generate(metadata=metadata))
            assert code is Status.UNAUTHENTICATED
            code, _ = await refusal(flush(common.FlushCacheRequest(), metadata=metadata))
            assert code is Status.UNAUTHENTICATED
        for metadata in (user, boss):
            assert len(await client.generate(metadata=metadata)) == 1
        code, _ = await refusal(flush(common.FlushCacheRequest(), metadata=user))
        assert code is Status.PERMISSION_DENIED
        assert (await flush(common.FlushCacheRequest(), metadata=boss)).success

    run(services, test, api_key="user", admin_api_key="boss")


def test_limits_of_the_server_hold_here_too(services: Services) -> None:
    async def test(client: Client) -> None:
        code, details = await refusal(client.generate(sampling={"n": 3}))
        assert (code, "3 samples" in details) == (Status.INVALID_ARGUMENT, True)

    run(replace(services, limits=RequestLimits(max_samples=2)), test)


def test_a_signal_drains_and_open_requests_end(services: Services, engine: ScriptedEngine) -> None:
    engine.hold_after = 2

    def drain() -> None:
        engine.unavailable_reason = "the server is shutting down"

    async def whole() -> None:
        async with serving(services, drain) as client:
            call = client.stub.Generate(asked(request_id="open"))
            while not engine.held:
                await asyncio.sleep(0.005)
            client.server.handle_exit(15)
            # Whoever comes now is told so at once, and so are the probes.
            code, details = await refusal(client.generate())
            assert (code, "shutting down" in details) == (Status.UNAVAILABLE, True)
            assert not (await client.stub.HealthCheck(pb.HealthCheckRequest())).healthy
            engine.hold_after = None
            (told,) = [one async for one in call]
            assert told.complete.finish_reason == "stop"

    asyncio.run(whole())


def test_a_second_signal_hurries(services: Services, engine: ScriptedEngine) -> None:
    engine.hold = True

    async def whole() -> None:
        async with serving(services) as client:
            call = client.stub.Generate(asked())
            while not engine.held:
                await asyncio.sleep(0.005)
            client.server.handle_exit(2)
            await asyncio.sleep(0.05)
            client.server.handle_exit(2)
            with pytest.raises(grpc.aio.AioRpcError):
                [one async for one in call]

    asyncio.run(whole())
    assert len(engine.abandoned) == 1
