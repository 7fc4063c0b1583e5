"""An engine that only generates tokens, a tokenizer for it, and a gateway that makes the chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sapwood.text.tokenizer import Tokenizer
from tests.gateway.stubs import Asked, Stub
from tests.text.conftest import byte_level

TEMPLATE = (
    "{% for m in messages %}<|begin|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if tools %}{% for t in tools %}<tools>{{ t | tojson }}</tools>{% endfor %}"
    "<tool_call>{% endif %}"
    "{% if add_generation_prompt %}<|begin|>assistant: {% endif %}"
)


def write_tokenizer(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    byte_level().save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return directory


class PlainStub(Stub):
    """Says the same text to everything, a token per event.

    is_incremental  events tell new tokens only, as some engines can be told to
    """

    def __init__(self, name: str, tokenizer: Tokenizer, says: str) -> None:
        super().__init__(name)
        self.ids = tokenizer.encode(says, add_special_tokens=False)
        self.reason: dict[str, Any] = {"type": "stop", "matched": None}
        self.is_incremental = False

    def events(self, asked: Asked) -> list[bytes]:
        body = json.loads(asked.body)
        told = []
        for count in range(1, len(self.ids) + 1):
            new = self.ids[count - 1 : count]
            is_last = count == len(self.ids)
            meta = {
                "prompt_tokens": len(body.get("input_ids", [])),
                "completion_tokens": count,
                "cached_tokens": 3,
                "finish_reason": self.reason if is_last else None,
                "output_token_logprobs": [[-0.5, one, None] for one in self.ids[:count]],
                "output_top_logprobs": [[[-0.5, one, None]] for one in self.ids[:count]],
            }
            ids = new if self.is_incremental else self.ids[:count]
            event = {"text": "unused", "output_ids": ids, "meta_info": meta}
            told.append(b"data: " + json.dumps(event).encode() + b"\n\n")
        return told
