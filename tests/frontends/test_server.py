"""Paths, bodies and connections: what all dialects have in common."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from sapwood.http.body import BodyLimits

CHAT = "/v1/chat/completions"
MAX_BODY_BYTES = BodyLimits().max_bytes
MESSAGES = '"messages": [{"role": "user", "content": "Hi"}]'


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "body"),
        (b"   ", "body"),
        (b"[1, 2]", "object"),
        (b'"text"', "object"),
        (b'{"temperature": NaN, ' + MESSAGES.encode() + b"}", "temperature"),
        (b'{"temperature": -Infinity}', "temperature"),
        (b'{"temperature": 1e999}', "temperature"),
        (b'{"temperature": 0.5, "messages": [{"role": "user", "content": "H', "content"),
        (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "content"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "content"),
        (b'{"messages": ' + b"[" * 3000 + b"]" * 3000 + b"}", "messages"),
        (b'{"metadata": ' + b"[" * 200 + b"]" * 200 + b"}", "nested"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/generate"])
def test_broken_bodies_are_400_and_say_where(api, path, raw, named):
    response = api.request("POST", path, content=raw)
    assert response.status_code == 400, response.text
    assert named in response.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ('"messages": null', "messages"),
        ('"messages": []', "messages"),
        ('"messages": "Hi"', "messages"),
        ('"messages": ["Hi"]', "messages[0]"),
        ('"messages": [{"role": "user"}]', "messages[0].content"),
        ('"messages": [{"content": "Hi"}]', "messages[0].role"),
        ('"messages": [{"role": "king", "content": "Hi"}]', "messages[0].role"),
        ('"messages": [{"role": "user", "content": 5}]', "messages[0].content"),
        ('"messages": [{"role": "user", "content": "a", "colour": 1}]', "messages[0].colour"),
        (
            '"messages": [{"role": "user", "content": [{"text": "a"}]}]',
            "messages[0].content[0].type",
        ),
        (f'{MESSAGES}, "temperature": "hot"', "temperature"),
        (f'{MESSAGES}, "temperature": true', "temperature"),
        (f'{MESSAGES}, "temperature": -0.1', "temperature"),
        (f'{MESSAGES}, "temperature": 1e300', "temperature"),
        (f'{MESSAGES}, "top_p": 0', "top_p"),
        (f'{MESSAGES}, "top_k": -2', "top_k"),
        (f'{MESSAGES}, "top_k": 1.5', "top_k"),
        (f'{MESSAGES}, "max_tokens": -2', "max_tokens"),
        (f'{MESSAGES}, "max_tokens": 1e30', "max_tokens"),
        (f'{MESSAGES}, "max_tokens": 99999999999999999999999', "max_tokens"),
        (f'{MESSAGES}, "max_tokens": 4, "max_completion_tokens": 5', "max_tokens"),
        (f'{MESSAGES}, "n": 0', "n"),
        (f'{MESSAGES}, "n": 129', "n"),
        (f'{MESSAGES}, "seed": 1.5', "seed"),
        (f'{MESSAGES}, "seed": 99999999999999999999999', "seed"),
        (f'{MESSAGES}, "priority": 9999999999999999999', "priority"),
        (f'{MESSAGES}, "stop": [1]', "stop[0]"),
        (f'{MESSAGES}, "stop": [""]', "stop"),
        (f'{MESSAGES}, "stop_token_ids": [-1]', "stop_token_ids[0]"),
        (f'{MESSAGES}, "logit_bias": {{"x": 1}}', "logit_bias"),
        (f'{MESSAGES}, "logit_bias": {{"1": 101}}', "logit_bias"),
        (f'{MESSAGES}, "logit_bias": {{"1": "a"}}', "logit_bias[...]"),
        (f'{MESSAGES}, "logit_bias": {{"-1": 1}}', "logit_bias"),
        (f'{MESSAGES}, "stream": "maybe"', "stream"),
        (f'{MESSAGES}, "stream_options": {{"include_usage": true}}', "stream_options"),
        (
            f'{MESSAGES}, "stream": true, "stream_options": {{"usage": true}}',
            "stream_options.usage",
        ),
        (f'{MESSAGES}, "rid": ["a"]', "rid"),
        (f'{MESSAGES}, "continue_final_message": true', "messages"),
        (f'{MESSAGES}, "chat_template_kwargs": {{"messages": []}}', "chat_template_kwargs"),
        (f'{MESSAGES}, "colour": "red"', "colour"),
    ],
)
def test_wrong_fields_are_400_and_named(api, engine, fields, param):
    response = api.request("POST", CHAT, content="{" + fields + "}")
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["object"] == "error"
    assert body["code"] == 400
    assert body["param"] == param, body["message"]
    assert param.split("[...]")[0].split(".")[-1].split("[")[0] in body["message"]
    assert engine.submitted == []


@pytest.mark.parametrize(
    "content_type", [None, "application/x-www-form-urlencoded", "text/plain", "application/json"]
)
def test_json_counts_whatever_the_content_type_says(api, content_type):
    headers = {} if content_type is None else {"content-type": content_type}
    response = api.request("POST", CHAT, content="{" + MESSAGES + "}", headers=headers)
    assert response.status_code == 200


def test_a_compressed_body_is_refused(api):
    response = api.request("POST", CHAT, content=b"x", headers={"content-encoding": "gzip"})
    assert response.status_code == 400
    assert "gzip" in response.json()["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_413(api, declared):
    async def parts():
        for _ in range(65):
            yield b" " * 2**20

    headers = {"content-length": str(MAX_BODY_BYTES + 1)} if declared else {}
    response = api.request("POST", CHAT, content=parts(), headers=headers)
    assert response.status_code == 413
    assert str(MAX_BODY_BYTES) in response.json()["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/nothing", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/generate", 405),
    ],
)
def test_wrong_paths_and_methods_are_json(api, method, path, status):
    response = api.request(method, path)
    assert response.status_code == status
    body = response.json()
    assert (body if path.startswith("/v1") else body["error"])["code"] == status
    if status == 405:
        assert "POST" in response.headers["allow"]


def test_the_openapi_document_describes_the_bodies(api):
    document = api.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    content = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
    assert "messages" in schemas["ChatRequest"]["required"]
    assert "temperature" in schemas["ChatRequest"]["properties"]


HI = [{"role": "user", "content": "Hi"}]
ASKED = [
    (CHAT, {"messages": HI}),
    (CHAT, {"messages": HI, "n": 2}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 500}),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 500}}),
    ("/v1/messages", {"model": "default", "messages": HI, "max_tokens": 500}),
    ("/api/chat", {"model": "default", "messages": HI}),
    ("/api/generate", {"model": "default", "prompt": "a"}),
]


@pytest.mark.parametrize(("path", "body"), ASKED)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_client_that_leaves_aborts_its_request(
    live, engine, until, leave, path, body, stream, num_tokens
):
    """Whether it leaves before the first token or after some."""
    engine.reply = "x" * 500
    engine.hold_after = num_tokens
    num_parts = 2 if body.get("n") == 2 or body.get("prompt") == ["a", "b"] else 1
    leave(live.url, path, {**body, "stream": stream}, lambda: len(engine.held) == num_parts)
    until(lambda: not engine.open)
    assert engine.abandoned == dict.fromkeys(engine.held, num_tokens)
    assert len(engine.submitted) == num_parts


def test_64_streams_at_once_are_whole(live, engine):
    engine.step_s = 0.001

    async def ask(client: httpx.AsyncClient, i: int) -> str:
        body = {"messages": [{"role": "user", "content": str(i)}], "stream": True}
        return (await client.post(CHAT, json=body)).text

    async def ask_all() -> list[str]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=live.url, limits=limits, timeout=60) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    texts = asyncio.run(ask_all())
    assert all(text.endswith("data: [DONE]\n\n") for text in texts)
    assert {text.count("data: ") for text in texts} == {16}
    assert engine.abandoned == {}


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/default", "/metrics", "/"])
def test_head_is_answered_as_get_without_its_body(api, path):
    """Review 2, number 11: load balancers ask so, and got 405."""
    got, asked = api.get(path), api.request("HEAD", path)
    assert asked.status_code == got.status_code != 405
    assert asked.headers["content-type"] == got.headers["content-type"]
    assert asked.content == b""
