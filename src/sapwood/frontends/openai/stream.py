"""Answers of OpenAI's dialect: usage, choices, and events whose constant parts are encoded once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Literal

import orjson

from sapwood.frontends.common.generate import Choice, generate
from sapwood.frontends.common.services import Services
from sapwood.frontends.openai.protocol import StreamOptions
from sapwood.schema.output import Finish
from sapwood.text.generation import TextRequest

_MID = b',"logprobs":null,"finish_reason":null,"matched_stop":null}'


def usage(samples: Sequence[Choice], first_samples: Iterable[Choice]) -> dict[str, object]:
    """samples: all of them; first_samples: one per prompt, so that a prompt counts once."""
    firsts = list(first_samples)
    num_prompt_tokens = sum(one.num_prompt_tokens for one in firsts)
    num_output_tokens = sum(one.num_output_tokens for one in samples)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(one.num_cached_tokens for one in firsts)},
    }


def finish_fields(finish: Finish | None) -> dict[str, object]:
    return {
        "logprobs": None,
        "finish_reason": finish.kind if finish is not None else None,
        "matched_stop": finish.matched if finish is not None else None,
    }


class EventEncoder:
    """Events of one answer: `data: {head, choices, usage}`, head and tail encoded once."""

    def __init__(
        self,
        *,
        kind: Literal["chat", "text"],
        answer_id: str,
        created: int,
        model: str,
        options: StreamOptions | None,
    ) -> None:
        self._options = options or StreamOptions()
        name = "chat.completion.chunk" if kind == "chat" else "text_completion"
        head = {"id": answer_id, "object": name, "created": created, "model": model}
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        # OpenAI sends "usage": null in each event when the last one will carry it.
        self._tail = b'],"usage":null}\n\n' if self._options.include_usage else b"]}\n\n"
        self._open, self._shut = (
            (b',"delta":{"content":', b"}") if kind == "chat" else (b',"text":', b"")
        )
        self._is_chat = kind == "chat"

    def role(self, index: int) -> bytes:
        """The first event of a chat's choice."""
        choice = b'{"index":%d,"delta":{"role":"assistant","content":""}' % index
        return self._head + choice + _MID + self._tail

    def text(self, index: int, text: str, so_far: Choice) -> bytes:
        encoded = orjson.dumps(text)
        choice = b'{"index":%d%b%b%b%b' % (index, self._open, encoded, self._shut, _MID)
        return self._head + choice + self._tail_for(so_far)

    def last(self, index: int, text: str, so_far: Choice) -> bytes:
        """The last text of a choice and why it ended; a chat sends these as two events."""
        before = b""
        choice: dict[str, object] = {"index": index}
        if self._is_chat:
            before = self.text(index, text, so_far) if text else b""
            choice["delta"] = {}
        else:
            choice["text"] = text
        choice |= finish_fields(so_far.finish)
        return before + self._head + orjson.dumps(choice) + self._tail_for(so_far)

    def usage(self, total: dict[str, object]) -> bytes:
        return self._head + b'],"usage":' + orjson.dumps(total) + b"}\n\n"

    def _tail_for(self, so_far: Choice) -> bytes:
        if not self._options.continuous_usage_stats:
            return self._tail
        return b'],"usage":' + orjson.dumps(usage([so_far], [so_far])) + b"}\n\n"

    @property
    def ends_with_usage(self) -> bool:
        return self._options.include_usage


async def encoded_events(
    services: Services,
    requests: Sequence[TextRequest],
    encoder: EventEncoder,
    *,
    opening: Sequence[str] | None,
) -> AsyncGenerator[bytes, None]:
    """All events of an answer but the final [DONE].

    opening  a text per request that each of its choices starts with (echo); None: a chat, whose
             choices start with a role
    """
    num_samples = requests[0].n
    choices = [Choice() for _ in range(len(requests) * num_samples)]
    started = [False] * len(choices)
    async with aclosing(generate(services, requests)) as chunks:
        async for position, chunk in chunks:
            index = position * num_samples + chunk.index
            so_far = choices[index]
            so_far.count(chunk)
            text = chunk.text
            encoded = b""
            if not started[index]:
                started[index] = True
                if opening is None:
                    encoded = encoder.role(index)
                else:
                    text = opening[position] + text
            if chunk.finish is not None:
                encoded += encoder.last(index, text, so_far)
            elif text:
                encoded += encoder.text(index, text, so_far)
            if encoded:
                yield encoded
    if encoder.ends_with_usage:
        yield encoder.usage(usage(choices, choices[::num_samples]))
