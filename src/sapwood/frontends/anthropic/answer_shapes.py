"""What Anthropic's endpoints answer, for the OpenAPI document.

Answers may have further fields; those that are named here are always there.
"""

from __future__ import annotations

from typing import Any

import msgspec


class MessageAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    type: str
    role: str
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: dict[str, Any]


class TokenCount(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int
