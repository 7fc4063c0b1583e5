"""Answers of OpenAI's dialect: usage, choices, and events whose constant parts are encoded once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Literal

import orjson

from sapwood.frontends.openai.logprobs import chunk_logprobs
from sapwood.frontends.openai.protocol import StreamOptions
from sapwood.frontends.serving.chat import Turn
from sapwood.frontends.serving.generate import Choice, cached_by_tier, generate, media_tokens
from sapwood.frontends.serving.hidden_states import encoded_last_hidden_state
from sapwood.frontends.serving.routed_experts import encoded_routed_experts
from sapwood.frontends.serving.services import Services
from sapwood.schema.output import Finish
from sapwood.text.events import CallArguments, CallStart, Content, Event, Reasoning
from sapwood.text.generation import TextRequest

_AFTER_LOGPROBS = b',"finish_reason":null,"matched_stop":null}'
_MID = b',"logprobs":null' + _AFTER_LOGPROBS


def usage(samples: Sequence[Choice], first_samples: Iterable[Choice]) -> dict[str, object]:
    """The usage of an answer.

    samples        all samples
    first_samples  one sample per prompt, so that each prompt counts once
    """
    firsts = list(first_samples)
    num_prompt_tokens = sum(sample.last.num_prompt_tokens for sample in firsts)
    num_output_tokens = sum(sample.last.num_output_tokens for sample in samples)
    counts: dict[str, object] = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(sample.last.num_cached_tokens for sample in firsts),
            **media_tokens(firsts),
        },
    }
    thought = [
        sample.num_reasoning_tokens for sample in samples if sample.num_reasoning_tokens is not None
    ]
    if thought:
        # In SGLang's place, at the top level, and in OpenAI's.
        counts["reasoning_tokens"] = sum(thought)
        counts["completion_tokens_details"] = {"reasoning_tokens": sum(thought)}
    return counts


def finish_fields(
    finish: Finish | None, logprobs: dict[str, object] | None = None, reason: str | None = None
) -> dict[str, object]:
    """The fields of a choice that say why it ended.

    reason  the finish reason, if it is not the finish's own kind
    """
    kind = finish.kind if finish is not None else None
    return {
        "logprobs": logprobs,
        "finish_reason": reason or kind,
        "matched_stop": finish.matched if finish is not None else None,
    }


def hidden_field(is_wanted: bool, choice: Choice) -> dict[str, object]:
    """A choice's field hidden_states, if the request asks for it."""
    return {"hidden_states": encoded_last_hidden_state(choice)} if is_wanted else {}


async def routed_field(is_wanted: bool, choice: Choice) -> dict[str, object]:
    """The field sglext, as SGLang calls it, if the request asks which experts computed its tokens.

    The first choice's is in the answer itself, where SGLang has it; each other choice has its own.
    """
    if not is_wanted:
        return {}
    return {"sglext": {"routed_experts": await encoded_routed_experts(choice)}}


def answer_field(
    routed: dict[str, object], tells_cache: bool, firsts: Sequence[Choice]
) -> dict[str, object]:
    """The answer's own sglext: the first choice's `routed_field`, and cached_tokens_details if the
    request asks for it.

    firsts  one sample per prompt
    """
    if not tells_cache:
        return routed
    told = routed.get("sglext")
    known = told if isinstance(told, dict) else {}
    details = cached_by_tier(sample.last for sample in firsts)
    return {"sglext": {**known, "cached_tokens_details": details}}


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
        tells_cache: bool,
    ) -> None:
        """tells_cache  whether the request asks for cached_tokens_details"""
        self._tells_cache = tells_cache
        self._options = options or StreamOptions()
        name = "chat.completion.chunk" if kind == "chat" else "text_completion"
        head = {"id": answer_id, "object": name, "created": created, "model": model}
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        # OpenAI sends "usage": null in each event when the last one will carry it.
        self._tail = b'],"usage":null}\n\n' if self._options.include_usage else b"]}\n\n"
        self._open, self._shut = (
            (b',"delta":{"content":', b"}") if kind == "chat" else (b',"text":', b"")
        )
        self.kind = kind

    def role(self, index: int) -> bytes:
        """The first event of a chat's choice."""
        choice = b'{"index":%d,"delta":{"role":"assistant","content":""}' % index
        return self._head + choice + _MID + self._tail

    def text(
        self, index: int, text: str, so_far: Choice, logprobs: dict[str, object] | None = None
    ) -> bytes:
        encoded = orjson.dumps(text)
        mid = _MID
        if logprobs is not None:
            mid = b',"logprobs":' + orjson.dumps(logprobs) + _AFTER_LOGPROBS
        choice = b'{"index":%d%b%b%b%b' % (index, self._open, encoded, self._shut, mid)
        return self._head + choice + self._tail_for(so_far)

    def delta(
        self,
        index: int,
        delta: dict[str, object],
        so_far: Choice,
        logprobs: dict[str, object] | None = None,
    ) -> bytes:
        """An event with a new part of a chat's choice that is not content."""
        choice: dict[str, object] = {"index": index, "delta": delta} | finish_fields(None, logprobs)
        return self._head + orjson.dumps(choice) + self._tail_for(so_far)

    def last(
        self, index: int, text: str, so_far: Choice, logprobs: dict[str, object] | None = None
    ) -> bytes:
        """The event with a completion's last text and the reason of its end."""
        choice: dict[str, object] = {"index": index, "text": text}
        choice |= finish_fields(so_far.last.finish, logprobs)
        return self._head + orjson.dumps(choice) + self._tail_for(so_far)

    def end(self, index: int, so_far: Choice, reason: str | None) -> bytes:
        """The event with the reason why a chat's choice ended."""
        choice: dict[str, object] = {"index": index, "delta": {}}
        choice |= finish_fields(so_far.last.finish, reason=reason)
        return self._head + orjson.dumps(choice) + self._tail_for(so_far)

    def hidden_states(self, index: int, so_far: Choice) -> bytes:
        """The event with the hidden states, after the last other event of a choice."""
        hidden = hidden_field(True, so_far)
        if self.kind == "chat":
            return self.delta(index, hidden, so_far)
        choice: dict[str, object] = {"index": index, "text": ""} | hidden | finish_fields(None)
        return self._head + orjson.dumps(choice) + self._tail_for(so_far)

    async def routed_experts(self, index: int, so_far: Choice) -> bytes:
        """The event with the routed experts, after the last other event of a choice."""
        routed = await routed_field(True, so_far)
        if index == 0:
            return self._head + b"]," + orjson.dumps(routed)[1:] + b"\n\n"
        empty: dict[str, object] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        choice = {"index": index} | empty | routed | finish_fields(None)
        return self._head + orjson.dumps(choice) + self._tail_for(so_far)

    def after_all(self, samples: Sequence[Choice], firsts: Sequence[Choice]) -> bytes:
        """The events after the last choice's: what else is asked for, and the usage.

        samples, firsts  as for `usage`
        """
        events = b""
        if self._tells_cache:
            details = answer_field({}, True, firsts)
            events = self._head + b"]," + orjson.dumps(details)[1:] + b"\n\n"
        if self._options.include_usage:
            total = usage(samples, firsts)
            events += self._head + b'],"usage":' + orjson.dumps(total) + b"}\n\n"
        return events

    def _tail_for(self, so_far: Choice) -> bytes:
        if not self._options.continuous_usage_stats:
            return self._tail
        return b'],"usage":' + orjson.dumps(usage([so_far], [so_far])) + b"}\n\n"


async def encoded_turn(
    services: Services, request: TextRequest, turn: Turn, encoder: EventEncoder
) -> AsyncGenerator[bytes, None]:
    """All events of a chat's answer but the final [DONE]."""
    choices = [Choice() for _ in range(request.n)]
    samples = [turn.sample() for _ in choices]
    started = [False] * request.n
    async with aclosing(generate(services, [request])) as chunks:
        async for _, chunk in chunks:
            index = chunk.index
            so_far, sample = choices[index], samples[index]
            so_far.count(chunk)
            events = sample.add(chunk)
            so_far.num_reasoning_tokens = sample.num_reasoning_tokens
            encoded = b"" if started[index] else encoder.role(index)
            started[index] = True
            logprobs = None
            if request.options.logprobs is not None:
                logprobs = await chunk_logprobs("chat", request, services.tokenizer, chunk)
            for event in events:
                told = _told(encoder, index, event, so_far, logprobs)
                encoded += told
                logprobs = None if told else logprobs
            if logprobs is not None:
                encoded += encoder.text(index, "", so_far, logprobs)
            if chunk.finish is not None:
                encoded += encoder.end(index, so_far, sample.finish_reason(chunk.finish))
                if request.options.return_hidden_states:
                    encoded += encoder.hidden_states(index, so_far)
                if request.options.return_routed_experts:
                    encoded += await encoder.routed_experts(index, so_far)
            if encoded:
                yield encoded
    if events_after := encoder.after_all(choices, choices[:1]):
        yield events_after


def _told(
    encoder: EventEncoder,
    index: int,
    event: Event,
    so_far: Choice,
    logprobs: dict[str, object] | None,
) -> bytes:
    """The delta that a client gets for an event of an answer; None for markup."""
    match event:
        case Content(text):
            return encoder.text(index, text, so_far, logprobs)
        case Reasoning(text):
            delta: dict[str, object] = {"reasoning_content": text}
        case CallStart(number, name, call_id):
            function = {"name": name, "arguments": ""}
            call = {"index": number, "id": call_id, "type": "function", "function": function}
            delta = {"tool_calls": [call]}
        case CallArguments(number, text):
            delta = {"tool_calls": [{"index": number, "function": {"arguments": text}}]}
        case _:
            return b""
    return encoder.delta(index, delta, so_far, logprobs)


async def encoded_events(
    services: Services,
    requests: Sequence[TextRequest],
    encoder: EventEncoder,
    *,
    opening: Sequence[str],
) -> AsyncGenerator[bytes, None]:
    """All events of a completion's answer but the final [DONE].

    opening  per request: the text with which its choices start (echo)
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
                text = opening[position] + text
            logprobs = None
            if requests[position].options.logprobs is not None:
                logprobs = await chunk_logprobs(
                    "text", requests[position], services.tokenizer, chunk, opening[position]
                )
            if chunk.finish is not None:
                encoded += encoder.last(index, text, so_far, logprobs)
                if requests[position].options.return_hidden_states:
                    encoded += encoder.hidden_states(index, so_far)
                if requests[position].options.return_routed_experts:
                    encoded += await encoder.routed_experts(index, so_far)
            elif text or logprobs is not None:
                encoded += encoder.text(index, text, so_far, logprobs)
            if encoded:
                yield encoded
    if events_after := encoder.after_all(choices, choices[::num_samples]):
        yield events_after
