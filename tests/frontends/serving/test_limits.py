from __future__ import annotations

import asyncio

import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving.limits import RequestLimits
from sapwood.http.body import BodyLimits
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.text.generation import TextGenerator, TextRequest


def request(
    n: int = 1,
    stop: tuple[str, ...] = (),
    embeds: tuple[bytes, ...] = (),
    bias: dict[int, float] | None = None,
) -> TextRequest:
    sampling = SamplingParams(stop=stop, logit_bias=bias or {})
    return TextRequest(
        request_id="r",
        prompt="Hi",
        n=n,
        options=RequestOptions(sampling=sampling),
        input_embeds=embeds,
    )


@pytest.mark.parametrize(
    ("requests", "param"),
    [
        ([request(n=5)], "n"),
        ([request(n=2)] * 3, "n"),
        ([request(stop=("a",) * 4)], "stop"),
        ([request(stop=("a" * 9,))], "stop"),
        ([request(n=2, embeds=(bytes(16),) * 4)], "input_embeds"),
        ([request(embeds=(bytes(16),) * 4)] * 2, "input_embeds"),
        ([request(n=4, bias={1: 1.0, 2: 1.0})], "logit_bias"),
        ([request(n=2, bias={1: 1.0, 2: 1.0})] * 2, "logit_bias"),
    ],
)
def test_what_is_too_much_is_named(requests, param):
    limits = RequestLimits(
        max_samples=4,
        max_stop_strings=3,
        max_stop_length=8,
        max_embed_bytes=100,
        max_token_ids=7,
    )
    with pytest.raises(InvalidRequest) as caught:
        limits.check(requests)
    assert caught.value.param == param
    limits.check([request(n=4, stop=("a" * 8,) * 3, bias={1: 1.0})])


@pytest.mark.parametrize("stream", [False, True])
def test_the_limits_hold_in_every_dialect(api_with, stream):
    api = api_with(limits=RequestLimits(max_stop_strings=1))
    messages = [{"role": "user", "content": "Hi"}]
    stop = ["a", "b"]
    for path, body in {
        "/generate": {"text": "Hi", "sampling_params": {"stop": stop}},
        "/v1/completions": {"prompt": "Hi", "stop": stop},
        "/v1/chat/completions": {"messages": messages, "stop": stop},
        "/v1/messages": {"messages": messages, "max_tokens": 2, "stop_sequences": stop},
        "/api/chat": {"messages": messages, "model": "default", "options": {"stop": stop}},
    }.items():
        refused = api.post(path, {**body, "stream": stream})
        assert refused.status_code == 400, path
        assert "at most 1" in refused.text


SCORED = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 4}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        # 10 tokens, the first without: 9 x 5 = 45 log probabilities per sample.
        ("/generate", {"text": "a" * 10, **SCORED, "sampling_params": {"n": 3}}),
        ("/generate", {"text": ["a" * 10] * 3, **SCORED}),
        ("/v1/completions", {"prompt": "a" * 10, "echo": True, "logprobs": 4, "n": 3}),
        ("/v1/completions", {"prompt": ["a" * 10] * 3, "echo": True, "logprobs": 4}),
    ],
)
def test_log_probabilities_of_prompts_are_bounded_over_the_whole_call(
    api_with, engine, path, body, stream
):
    engine.hold = True
    refused = api_with(limits=RequestLimits(max_logprobs=134)).post(
        path, {**body, "stream": stream}
    )
    assert refused.status_code == 400
    assert "at most 134 in one call, its --max-logprobs-per-call" in refused.text
    assert engine.open == {}
    engine.hold = False
    engine.reply = ""
    allowed = {**body, "max_tokens": 0} if path != "/generate" else body
    # The end of sequence is an output token too, in each of three samples.
    api = api_with(limits=RequestLimits(max_logprobs=135 + 15))
    assert api.post(path, {**allowed, "stream": stream}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a", "return_logprob": True, "top_logprobs_num": 4}),
        ("/v1/completions", {"prompt": "a", "logprobs": 4}),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "a"}],
                "logprobs": True,
                "top_logprobs": 4,
            },
        ),
    ],
)
def test_those_of_an_output_count_where_the_answer_holds_them(api_with, engine, path, body):
    api = api_with(limits=RequestLimits(max_logprobs=20))
    refused = api.post(path, body)
    assert refused.status_code == 400
    assert "--max-logprobs-per-call" in refused.text
    assert engine.open == {}
    streamed = api.post(path, {**body, "stream": True})
    holds_them = path == "/generate"
    assert ("--max-logprobs-per-call" in streamed.text) == holds_them


def test_hidden_states_are_bounded_before_they_are_computed(api_with, engine, tokenizer):
    generator = TextGenerator(engine, tokenizer, tells_hidden=True, hidden_size=8)
    api = api_with(generator=generator, limits=RequestLimits(max_embed_bytes=10 * 8 * 4 * 2))
    body = {"text": "a" * 10, "return_hidden_states": True}
    refused = api.post("/generate", {**body, "sampling_params": {"n": 3}})
    assert refused.status_code == 400
    assert "hidden states as fp32" in refused.text
    assert engine.submitted == []
    assert api.post("/generate", {**body, "sampling_params": {"n": 2}}).status_code == 200


def test_the_body_has_the_limits_that_the_server_was_given(guarded):
    api = guarded(body_limits=BodyLimits(max_bytes=200, max_depth=3))
    assert api.post("/tokenize", {"prompt": "a" * 300}).status_code == 413
    nested = api.post("/tokenize", {"prompt": [[[1]]]})
    assert nested.status_code == 400
    assert "deeper than 3" in nested.text
    assert api.post("/tokenize", {"prompt": "a"}).status_code == 200


def test_a_body_that_does_not_come_is_408(services):
    from sapwood.frontends.server import create_app

    app = create_app(services, body_limits=BodyLimits(timeout_s=0.05))
    sent: list[dict] = []

    async def receive() -> dict:
        await asyncio.sleep(5)
        raise AssertionError("nobody waited so long")

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/tokenize",
        "raw_path": b"/tokenize",
        "query_string": b"",
        "headers": [(b"content-length", b"10")],
        "scheme": "http",
        "http_version": "1.1",
        "server": ("t", 80),
        "client": ("t", 1),
    }
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408
    assert b"--request-body-timeout" in sent[1]["body"]
