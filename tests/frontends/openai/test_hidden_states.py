"""return_hidden_states in OpenAI's dialect: the vector of the last token that was computed."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from sapwood.frontends.server import create_app
from sapwood.frontends.serving.services import Services
from sapwood.schema.output import RequestOutput
from sapwood.schema.request import Generate
from sapwood.text.generation import TextGenerator
from tests.frontends.conftest import Api, ScriptedEngine

BODIES = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
}


class TellingEngine(ScriptedEngine):
    """The hidden state of the token at position p is [p, 0.1]."""

    async def _outputs(self, request: Generate) -> AsyncIterator[RequestOutput]:
        assert request.options.return_hidden_states
        position = 0
        end = len(request.prompt_ids)
        async for output in super()._outputs(request):
            told = [struct.pack("<2f", one, 0.1) for one in range(position, end)]
            yield msgspec.structs.replace(output, hidden_states=told)
            position, end = end, end + len(output.token_ids)


@pytest.fixture
def api(services: Services) -> Api:
    engine: Any = TellingEngine(services.tokenizer)
    generator = TextGenerator(engine, services.tokenizer, tells_hidden=True)
    return Api(create_app(replace(services, engine=engine, generator=generator)))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_the_last_vector(api: Api, path: str, num_tokens: int, events: Any) -> None:
    body = BODIES[path] | {"return_hidden_states": True, "max_tokens": num_tokens, "n": 2}
    answer = api.post(path, body).json()
    last = answer["usage"]["prompt_tokens"] + num_tokens - 2
    expected = [] if num_tokens == 1 else [last, 0.1]
    assert [choice["hidden_states"] for choice in answer["choices"]] == [expected] * 2
    got = events(api.post(path, body | {"stream": True}).text)
    told: dict[int, Any] = {}
    for event in got:
        for choice in event["choices"]:
            holder = choice["delta"] if "chat" in path else choice
            if "hidden_states" in holder:
                assert choice["index"] not in told
                assert choice["finish_reason"] is None
                told[choice["index"]] = holder["hidden_states"]
    assert told == {0: expected, 1: expected}


@pytest.mark.parametrize("path", BODIES)
def test_nothing_unless_asked(services: Services, engine: ScriptedEngine, path: str) -> None:
    api = Api(create_app(services))
    assert "hidden_states" not in api.post(path, BODIES[path]).text
    assert not engine.submitted[0].options.return_hidden_states
