"""What `sapwood bench conversations` asks, and how it counts."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sapwood.base.errors import ConfigError, StartupError
from sapwood.bench.conversations import Conversations, ConversationsOptions, known_table
from tests.gateway.stubs import Asked, Running, Stub

SMALL: dict[str, Any] = {
    "conversations": 5,
    "turns": 3,
    "system_prompts": 2,
    "document_words": 20,
    "concurrency": 3,
}


class Knowing(Stub):
    """Says that it knew all of a prompt's messages but the last one."""

    def answer(self, asked: Asked) -> object:
        num = len(json.loads(asked.body)["messages"])
        return {
            "choices": [{"message": {"content": f"answer {num}"}}],
            "usage": {"prompt_tokens": num, "prompt_tokens_details": {"cached_tokens": num - 1}},
        }


def run(stub: Stub, **options: Any) -> Any:
    async def asking() -> Any:
        async with Running(stub) as engine:
            return await Conversations(ConversationsOptions(url=engine.url, **options)).run()

    return asyncio.run(asking())


def test_conversations_grow_and_take_turns() -> None:
    stub = Knowing("a")
    known = run(stub, **SMALL, seed=1)
    asked = [json.loads(one.body)["messages"] for one in stub.posts]
    # All take a turn before any takes the next one.
    assert [len(messages) for messages in asked] == [2] * 5 + [4] * 5 + [6] * 5
    begun = {messages[1]["content"] for messages in asked}
    assert len(begun) == 5
    assert len({messages[0]["content"] for messages in asked}) == 2
    for messages in asked[10:]:
        (before,) = [one for one in asked[5:10] if one == messages[:4]]
        assert messages[4] == {"role": "assistant", "content": "answer 4"}
        assert len(before[1]["content"].split()) == 50
        assert len(messages[5]["content"].split()) == 30
    assert (known.num_requests, known.num_prompt_tokens) == (15, 60)
    assert known.share == 45 / 60
    assert known_table(ConversationsOptions(**SMALL), known).row_count == 1


def test_equal_seeds_ask_the_same() -> None:
    texts = []
    for seed in (1, 1, 2):
        stub = Knowing("a")
        run(stub, **SMALL, seed=seed)
        texts.append(sorted(one.body for one in stub.posts))
    assert texts[0] == texts[1] != texts[2]


def test_a_request_that_fails_ends_the_run() -> None:
    stub = Knowing("a")
    stub.behaviour = 503
    with pytest.raises(StartupError, match="told to fail"):
        run(stub, **SMALL)


@pytest.mark.parametrize("name", ["conversations", "turns", "concurrency", "answer_tokens"])
def test_numbers_that_make_no_sense(name: str) -> None:
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        ConversationsOptions(**{name: 0})
