"""An engine that answers requests for responses with what it was sent."""

from __future__ import annotations

import json
from typing import Any

from tests.gateway.stubs import Asked, Stub


class Responder(Stub):
    """Says all texts of its input, joined.

    status  of its responses
    """

    def __init__(self, name: str = "a") -> None:
        super().__init__(name)
        self.status = "completed"
        self.end = b"\n"

    def answer(self, asked: Asked) -> dict[str, Any]:
        said = {"type": "output_text", "text": "|".join(texts(asked.body)), "annotations": []}
        message = {
            "id": f"msg_{self.name}{len(self.asked)}",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [said],
        }
        return {
            "id": "resp_of_worker",
            "object": "response",
            "created_at": 1.0,
            "status": self.status,
            "model": "m",
            "store": False,
            "previous_response_id": None,
            "output": [message],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }

    def events(self, asked: Asked) -> list[bytes]:
        answer = self.answer(asked)
        begun = {**answer, "status": "in_progress", "output": []}
        told = [
            {"type": "response.created", "response": begun},
            {"type": "response.in_progress", "response": begun},
            {
                "type": "response.output_text.delta",
                "item_id": "msg_1",
                "output_index": 0,
                "content_index": 0,
                "logprobs": [],
                # Text that looks like an event.
                "delta": '"type": "response.completed"',
            },
            {"type": f"response.{self.status}", "response": answer},
        ]
        return [self._encoded({**event, "sequence_number": n}) for n, event in enumerate(told)]

    def _encoded(self, event: dict[str, Any]) -> bytes:
        lines = [b"event: " + event["type"].encode(), b"data: " + json.dumps(event).encode()]
        return self.end.join([*lines, b"", b""])


def texts(body: bytes) -> list[str]:
    """The texts of a request's input, each with the first letter of who says it."""
    given = json.loads(body)["input"]
    if isinstance(given, str):
        return [f"u:{given}"]
    found = []
    for item in given:
        content = item["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        found.append(f"{item['role'][0]}:{text}")
    return found
