import asyncio
import json
from contextlib import aclosing

import pytest

from sapwood.frontends.server import inner_app
from sapwood.http.in_process import Refused, in_process, streamed

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}]}
STREAM = {**BODY, "stream": True}


def test_a_post_gets_what_http_gets(services, api):
    status, content = asyncio.run(in_process(inner_app(services))(CHAT, {**BODY, "rid": "r"}))
    over_http = api.post(CHAT, {**BODY, "rid": "r"}).json()
    answer = json.loads(content)
    assert status == 200
    assert (answer["choices"], answer["usage"]) == (over_http["choices"], over_http["usage"])
    status, content = asyncio.run(in_process(inner_app(services))(CHAT, {"messages": 3}))
    assert (status, json.loads(content)["param"]) == (400, "messages")
    assert asyncio.run(in_process(inner_app(services))("/nowhere", {}))[0] == 404


async def all_of(app, body):
    async with aclosing(streamed(app, CHAT, body)) as events:
        return [event async for event in events]


def test_a_stream_s_events_come_as_objects(services):
    events = asyncio.run(all_of(inner_app(services), STREAM))
    texts = [one["choices"][0]["delta"].get("content") or "" for one in events]
    assert "".join(texts) == "Hello, wörld!"


def test_refusals_and_failures_are_raised(services, engine):
    with pytest.raises(Refused, match="top_p") as refused:
        asyncio.run(all_of(inner_app(services), {**STREAM, "top_p": 7}))
    assert (refused.value.status, refused.value.param) == (400, "top_p")
    engine.fail_after = 2
    with pytest.raises(Refused, match="out of pages") as failed:
        asyncio.run(all_of(inner_app(services), STREAM))
    assert failed.value.status == 503


def test_who_stops_listening_aborts(services, engine):
    engine.step_s = 0.001

    async def leave():
        async with aclosing(streamed(inner_app(services), CHAT, STREAM)) as events:
            await anext(events)
            assert len(engine.open) == 1
        return len(engine.open)

    assert asyncio.run(leave()) == 0
    assert len(engine.abandoned) == 1


def test_who_is_cancelled_aborts(services, engine):
    engine.hold = True

    async def leave():
        asking = asyncio.create_task(in_process(inner_app(services))(CHAT, BODY))
        while not engine.open:
            await asyncio.sleep(0.001)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        return len(engine.open)

    assert asyncio.run(leave()) == 0


def test_a_bug_is_a_500_and_in_the_log(services, monkeypatch, caplog):
    monkeypatch.setattr(type(services.generator), "generate", lambda *_: 1 / 0)
    status, content = asyncio.run(in_process(inner_app(services))(CHAT, BODY))
    assert (status, json.loads(content)["type"]) == (500, "InternalServerError")
    assert "ZeroDivisionError" in caplog.text


def test_a_call_that_cannot_even_be_made_is_raised(services):
    async def in_time():
        async with asyncio.timeout(5):
            await all_of(inner_app(services), {**STREAM, "logit_bias": {7: 1.0}})

    # JSON has no keys that are numbers.
    with pytest.raises(TypeError, match="must be str"):
        asyncio.run(in_time())
