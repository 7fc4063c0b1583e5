import asyncio
import random
from itertools import pairwise

import pytest

from sapwood.base.errors import ConfigError, EngineUnavailable
from sapwood.bench.serving import (
    Load,
    ServingOptions,
    arrival_delays_s,
    connect,
    run_workload,
    server_vocabulary,
    warm_up,
)
from sapwood.bench.workloads.vocabulary import WORDS, TokenVocabulary, WordVocabulary
from sapwood.bench.workloads.workload import FixedLengths, SharedPrefix, WorkloadSpec

TOKENS = TokenVocabulary(tuple(range(100, 200)))
SIX = WorkloadSpec(
    name="six",
    title="six requests",
    shape=FixedLengths(num_requests=6, prompt_tokens=8, output_tokens=5),
)


def measure(server, *, spec=SIX, load=None, vocabulary=TOKENS, **options):
    async def main():
        target = await connect(ServingOptions(url=server.url, **options))
        workload = spec.generate(vocabulary, seed=0)
        return await run_workload(target, workload, load or Load())

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("api", "path", "cached"),
    [("completions", "/v1/completions", 4), ("native", "/generate", 2)],
)
def test_streams_of_token_ids_are_timed(server, api, path, cached):
    run = measure(server, api=api)
    metrics = run.metrics
    assert (metrics.num_completed, metrics.num_failed) == (6, 0)
    assert (metrics.num_prompt_tokens, metrics.num_output_tokens) == (48, 30)
    assert metrics.num_cached_tokens == 6 * cached
    (warning,) = metrics.warnings
    assert warning.startswith(f"{6 * cached} prompt tokens came from the server's cache")
    for timeline in run.timelines:
        assert len(timeline.token_s) == 5
        assert timeline.finish == "length"
        assert timeline.sent_s <= timeline.token_s[0] <= timeline.token_s[-1] <= timeline.end_s
    assert len(server.bodies(path)) == 6


def test_the_prompts_of_the_workload_arrive(server):
    run = measure(server)
    sent = [tuple(body["prompt"]) for body in server.bodies("/v1/completions")]
    assert sorted(sent) == sorted(request.prompt for request in run.workload.requests)
    assert {body["model"] for body in server.bodies("/v1/completions")} == {"tiny"}


def test_chat_takes_text(server):
    run = measure(server, api="chat", vocabulary=WordVocabulary(WORDS), model="named")
    assert run.metrics.num_completed == 6
    assert run.metrics.num_output_tokens == 30
    # The first event of a chat has a role and no token.
    assert all(len(timeline.token_s) == 5 for timeline in run.timelines)
    assert server.bodies("/v1/models") == []


def test_a_body_without_length_ends_with_the_connection(server, fake):
    server.reply = lambda path, body: (
        fake.answer_well(path, body)
        if path == "/v1/models"
        else fake.Reply(events=fake.openai_events(body, chat=False), framing="close")
    )
    assert measure(server).metrics.num_completed == 6


def test_failures_are_counted_with_their_messages(server, fake):
    def reply(path, body):
        if path == "/v1/models":
            return fake.answer_well(path, body)
        served = len(server.bodies(path))
        if served <= 2:
            return fake.Reply(status=503, body={"error": {"message": "the queue is full"}})
        if served == 3:
            return fake.Reply(events=['{"error": {"message": "engine died"}}'])
        if served == 4:
            events = fake.openai_events(body, chat=False)
            return fake.Reply(events=events[:2], cut=True)
        if served == 5:
            return fake.Reply(body={"choices": [{"text": "whole", "finish_reason": "length"}]})
        return fake.answer_well(path, body)

    server.reply = reply
    metrics = measure(server).metrics
    assert (metrics.num_completed, metrics.num_failed) == (1, 5)
    messages = {failure.message: failure.count for failure in metrics.failures}
    assert messages == {
        "HTTP 503: the queue is full": 2,
        "the stream ended with an error: engine died": 1,
        "the server closed the connection before its answer was whole": 1,
        "the answer is not a stream of events but application/json": 1,
    }


def test_a_stream_that_just_stops_is_a_failure(server, fake):
    server.reply = lambda path, body: (
        fake.answer_well(path, body)
        if path == "/v1/models"
        else fake.Reply(events=fake.openai_events(body, chat=False)[:3])
    )
    metrics = measure(server).metrics
    assert metrics.num_failed == 6
    assert metrics.failures[0].message == "the stream ended before the request had finished"


def test_events_are_counted_where_the_server_does_not(server, fake):
    server.reply = lambda path, body: (
        fake.answer_well(path, body)
        if path == "/v1/models"
        else fake.Reply(events=fake.openai_events(body, chat=False, usage=False))
    )
    metrics = measure(server).metrics
    assert metrics.num_output_tokens == 30
    assert metrics.num_prompt_tokens == 48
    assert "6 answers came without token counts" in metrics.warnings[0]


def test_a_server_that_ignores_the_length_is_warned_about(server, fake):
    def reply(path, body):
        return fake.answer_well(path, {**body, "max_tokens": 3})

    server.reply = reply
    warning, *_ = measure(server).metrics.warnings
    assert warning.startswith("6 of 6 outputs do not have the length asked for")


def test_concurrency_is_bounded(server):
    run = measure(server, load=Load(max_concurrency=2))
    assert run.metrics.num_completed == 6
    assert run.metrics.peak_concurrency == 2


def test_all_at_once_without_a_bound(server):
    assert measure(server).metrics.peak_concurrency == 6


def test_a_phase_waits_for_the_one_before(server):
    shape = SharedPrefix(
        prefix_groups=1,
        requests_per_group=4,
        prefix_tokens=8,
        suffix_tokens=2,
        output_tokens=3,
        primed=True,
    )
    run = measure(server, spec=WorkloadSpec(name="p", title="p", shape=shape))
    first, *others = run.timelines
    assert all(other.sent_s >= first.end_s for other in others)
    # Hits are what a shared prefix is for.
    assert run.metrics.num_cached_tokens > 0
    assert run.metrics.warnings == ()
    assert run.metrics.num_completed == 4


def test_arrivals_are_a_poisson_process():
    assert arrival_delays_s(float("inf"), 3, random.Random(0)) == [0.0, 0.0, 0.0]
    delays_s = arrival_delays_s(50.0, 20_000, random.Random(0))
    assert delays_s == sorted(delays_s)
    assert delays_s == arrival_delays_s(50.0, 20_000, random.Random(0))
    gaps = [later - earlier for earlier, later in pairwise(delays_s)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    # Exponential gaps: the standard deviation equals the mean.
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.05)


def test_requests_are_sent_at_their_rate(server):
    run = measure(server, load=Load(rate=200.0, seed=1))
    delays_s = arrival_delays_s(200.0, 6, random.Random("arrivals/1"))
    for timeline, delay_s in zip(run.timelines, delays_s, strict=True):
        assert timeline.sent_s >= delay_s


def test_the_servers_tokenizer_gives_the_vocabulary(server):
    async def main():
        return await server_vocabulary(await connect(ServingOptions(url=server.url)))

    assert asyncio.run(main()).token_ids == tuple(range(100, 200))
    (asked,) = server.bodies("/tokenize")
    assert asked["model"] == "tiny"
    assert asked["add_special_tokens"] is False


def test_the_other_spelling_of_tokenize_is_tried(server, fake):
    def reply(path, body):
        if path == "/tokenize" and "content" not in body:
            return fake.Reply(status=400, body={"error": {"message": "content is missing"}})
        return fake.answer_well(path, body)

    server.reply = reply

    async def main():
        return await server_vocabulary(await connect(ServingOptions(url=server.url)))

    assert len(asyncio.run(main()).token_ids) == 100


def test_a_server_without_tokenize_says_the_way_out(server, fake):
    server.reply = lambda path, body: (
        fake.Reply(status=404, body={"detail": "Not Found"})
        if path == "/tokenize"
        else fake.answer_well(path, body)
    )

    async def main():
        await server_vocabulary(await connect(ServingOptions(url=server.url)))

    with pytest.raises(ConfigError, match=r"Not Found.*--tokenizer, or use --prompts text"):
        asyncio.run(main())


def test_no_server_is_said_at_once(server):
    async def main():
        await connect(ServingOptions(url="http://127.0.0.1:1"))

    with pytest.raises(EngineUnavailable, match="start the server, or name the model"):
        asyncio.run(main())


def test_a_failed_warm_up_ends_the_run(server, fake):
    server.reply = lambda path, body: fake.Reply(status=500, body={"error": {"message": "no"}})

    async def main():
        target = await connect(ServingOptions(url=server.url, model="m"))
        await warm_up(target, SIX.generate(TOKENS, seed=0).requests)

    with pytest.raises(EngineUnavailable, match=r"warm-up request .* failed: HTTP 500: no"):
        asyncio.run(main())
    assert len(server.bodies("/v1/completions")) == 1


def test_a_key_is_sent(server):
    measure(server, api_key="secret")
    assert all("authorization: Bearer secret\r\n" in head for head in server.headers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "nowhere"}, "--url"),
        ({"request_rate": 0.0}, "--request-rate is 0.0"),
        ({"request_rate": float("nan")}, "--request-rate is nan"),
        ({"max_concurrency": 0}, "--max-concurrency is 0"),
        ({"num_warmups": -1}, "--num-warmups is -1"),
        ({"request_timeout": 0.0}, "--request-timeout"),
        ({"temperature": -1.0}, "--temperature"),
        ({"api": "chat", "prompts": "ids"}, "takes no token ids"),
        ({"prompts": "text", "tokenizer": "x"}, "no use for text"),
        ({"extra_body": "{"}, "not JSON"),
        ({"extra_body": "[]"}, "must be a JSON object"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ServingOptions(**options)
