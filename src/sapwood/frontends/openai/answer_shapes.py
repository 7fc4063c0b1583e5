"""What OpenAI's endpoints answer, for the OpenAPI document.

Answers may have further fields; those that are named here are always there.
"""

from __future__ import annotations

from typing import Any

import msgspec


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int | None
    is_generation: bool
    media: list[str]
    has_reasoning: bool
    tool_call_parser: str | None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str
    data: list[ModelCard]


class TokenUsage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: TokenUsage


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    object: str
    data: list[dict[str, Any]]
    model: str
    usage: dict[str, int]
