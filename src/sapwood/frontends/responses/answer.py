"""Builds a response from a chat's deltas: its items, and the events about them.

Source: OpenAI's reference of streaming events for responses.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from sapwood.base.errors import SapwoodError
from sapwood.history.interface import Record, new_id

Event = dict[str, Any]

_LAST_EVENT = {
    "completed": "response.completed",
    "failed": "response.failed",
    # OpenAI has no event for a cancelled response; clients wait for one of these three.
    "incomplete": "response.incomplete",
    "cancelled": "response.incomplete",
}


def encoded(event: Event) -> bytes:
    name: bytes = event["type"].encode()
    return b"event: " + name + b"\ndata: " + orjson.dumps(event) + b"\n\n"


class Answer:
    """One response. Its methods change `record` and return the numbered events of the change.

    record         the response as the API shows it
    with_logprobs  whether the client asked for log probabilities
    """

    def __init__(self, record: Record, *, with_logprobs: bool) -> None:
        self.record = record
        self._with_logprobs = with_logprobs
        self._number = 0
        self._open: _OpenItem | None = None
        self._finish_reason: str | None = None
        self._is_over = False

    def begin(self) -> list[Event]:
        created = self._about_all("response.created")
        return [created, *self.go_on()]

    def queue(self) -> list[Event]:
        """The beginning of a response that runs in the background; `go_on` follows."""
        self.record["status"] = "queued"
        return [self._about_all("response.created"), self._about_all("response.queued")]

    def go_on(self) -> list[Event]:
        self.record["status"] = "in_progress"
        return [self._about_all("response.in_progress")]

    def add(self, chunk: Mapping[str, Any]) -> list[Event]:
        """Take over the changes that an event of a streamed chat brings."""
        events: list[Event] = []
        if chunk.get("usage"):
            self.record["usage"] = _usage(chunk["usage"])
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            if delta.get("reasoning_content"):
                events += self._text("reasoning", delta["reasoning_content"], [])
            logprobs = (choice.get("logprobs") or {}).get("content") or []
            # A token may be half a character: then it has log probabilities, but no text.
            if delta.get("content") or logprobs:
                events += self._text("message", delta.get("content") or "", logprobs)
            for call in delta.get("tool_calls") or ():
                events += self._call(call)
            if choice.get("finish_reason"):
                self._finish_reason = choice["finish_reason"]
        return events

    def finish(self) -> list[Event]:
        """End the response; the chat's finish reason decides its status."""
        if self._finish_reason == "length":
            self.record["incomplete_details"] = {"reason": "max_output_tokens"}
            return self._end("incomplete")
        return self._end("cancelled" if self._finish_reason == "abort" else "completed")

    def fail(self, error: SapwoodError) -> list[Event]:
        if self._is_over:
            return []
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self.record["error"] = {"code": code, "message": error.message}
        return self._end("failed")

    def cancel(self) -> list[Event]:
        """Cancel the response; no events if it has ended already."""
        return self._end("cancelled")

    # ---- inside ------------------------------------------------------------------------------

    def _end(self, status: str) -> list[Event]:
        if self._is_over:
            return []
        self._is_over = True
        events = list(self._close(is_whole=status == "completed"))
        self.record["status"] = status
        if status == "completed":
            self.record["completed_at"] = time.time()
        return [*events, self._about_all(_LAST_EVENT[status])]

    def _text(self, kind: str, text: str, logprobs: list[Any]) -> Iterator[Event]:
        if self._open is None or self._open.kind != kind:
            yield from self._close(is_whole=True)
            yield from self._start(_OpenItem(kind, len(self.record["output"])))
        opened = self._open
        assert opened is not None
        opened.texts.append(text)
        if kind == "reasoning":
            yield self._event("response.reasoning_text.delta", **opened.place, delta=text)
            return
        opened.logprobs += logprobs
        shown = [_delta_logprob(entry) for entry in logprobs] if self._with_logprobs else []
        yield self._event("response.output_text.delta", **opened.place, delta=text, logprobs=shown)

    def _call(self, call: Mapping[str, Any]) -> Iterator[Event]:
        """Take over a piece of a function call; the first piece of a call has its name."""
        function = call.get("function") or {}
        opened = self._open
        if (
            opened is None
            or opened.kind != "function_call"
            or opened.call_index != call.get("index", 0)
        ):
            yield from self._close(is_whole=True)
            opened = _OpenItem("function_call", len(self.record["output"]))
            opened.call_index = call.get("index", 0)
            opened.call_id = call.get("id") or new_id("call")
            opened.name = function.get("name") or ""
            yield from self._start(opened)
        piece = function.get("arguments")
        if piece:
            opened.texts.append(piece)
            yield self._event(
                "response.function_call_arguments.delta",
                item_id=opened.item_id,
                output_index=opened.output_index,
                delta=piece,
            )

    def _start(self, opened: _OpenItem) -> Iterator[Event]:
        self._open = opened
        item = opened.item("in_progress", has_content=False)
        self.record["output"].append(item)
        yield self._event(
            "response.output_item.added", output_index=opened.output_index, item=dict(item)
        )
        if opened.kind != "function_call":
            yield self._event(
                "response.content_part.added", **opened.place, part=opened.part(self._with_logprobs)
            )

    def _close(self, *, is_whole: bool) -> Iterator[Event]:
        opened = self._open
        if opened is None:
            return
        self._open = None
        text = opened.text
        if opened.kind == "function_call":
            yield self._event(
                "response.function_call_arguments.done",
                item_id=opened.item_id,
                output_index=opened.output_index,
                name=opened.name,
                arguments=text,
            )
        else:
            part = opened.part(self._with_logprobs)
            if opened.kind == "message":
                shown = [_delta_logprob(entry) for entry in opened.logprobs]
                logprobs = {"logprobs": shown if self._with_logprobs else []}
                yield self._event(
                    "response.output_text.done", **opened.place, text=text, **logprobs
                )
            else:
                yield self._event("response.reasoning_text.done", **opened.place, text=text)
            yield self._event("response.content_part.done", **opened.place, part=part)
        item = opened.item(
            "completed" if is_whole else "incomplete",
            has_content=True,
            with_logprobs=self._with_logprobs,
        )
        self.record["output"][opened.output_index] = item
        yield self._event("response.output_item.done", output_index=opened.output_index, item=item)

    def _about_all(self, kind: str) -> Event:
        # A copy, since the record goes on changing while the event waits to be sent.
        return self._event(kind, response={**self.record, "output": list(self.record["output"])})

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event


class _OpenItem:
    """The item that is being written: reasoning, a message or a function call."""

    def __init__(self, kind: str, output_index: int) -> None:
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        self.kind = kind
        self.item_id = new_id(prefix)
        self.output_index = output_index
        self.texts: list[str] = []
        self.logprobs: list[Any] = []
        self.call_index = 0
        self.call_id = ""
        self.name = ""

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.item_id, "output_index": self.output_index, "content_index": 0}

    def part(self, with_logprobs: bool) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        logprobs = [_full_logprob(entry) for entry in self.logprobs] if with_logprobs else []
        return {
            "type": "output_text",
            "text": self.text,
            "annotations": [],
            "logprobs": logprobs,
        }

    def item(
        self, status: str, *, has_content: bool, with_logprobs: bool = False
    ) -> dict[str, Any]:
        head = {"id": self.item_id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            arguments = self.text if has_content else ""
            return {**head, "call_id": self.call_id, "name": self.name, "arguments": arguments}
        content = [self.part(with_logprobs)] if has_content else []
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": content}
        return {**head, "role": "assistant", "content": content}


def _full_logprob(entry: Mapping[str, Any]) -> dict[str, Any]:
    alternatives = [
        {"token": likely["token"], "bytes": likely.get("bytes") or [], "logprob": likely["logprob"]}
        for likely in entry.get("top_logprobs") or ()
    ]
    return {
        "token": entry["token"],
        "bytes": entry.get("bytes") or [],
        "logprob": entry["logprob"],
        "top_logprobs": alternatives,
    }


def _delta_logprob(entry: Mapping[str, Any]) -> dict[str, Any]:
    alternatives = [
        {"token": likely["token"], "logprob": likely["logprob"]}
        for likely in entry.get("top_logprobs") or ()
    ]
    return {"token": entry["token"], "logprob": entry["logprob"], "top_logprobs": alternatives}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    read = usage.get("prompt_tokens_details") or {}
    written = usage.get("completion_tokens_details") or {}
    num_reasoning_tokens = written.get("reasoning_tokens") or usage.get("reasoning_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": read.get("cached_tokens") or 0,
            **{name: read[name] for name in ("image_tokens", "video_tokens") if name in read},
            # Their count of tokens that are billed as written to the cache; nothing is billed here.
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
        "total_tokens": usage["total_tokens"],
    }
