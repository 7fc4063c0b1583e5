"""What Ollama's endpoints answer, for the OpenAPI document.

Answers may have further fields; those that are named here are always there.
"""

from __future__ import annotations

from typing import Any

import msgspec


class OllamaAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer has `message` too from /api/chat, and `response` from /api/generate."""

    model: str
    created_at: str
    done: bool


class OllamaModel(msgspec.Struct, frozen=True, kw_only=True):
    details: dict[str, Any]
    model_info: dict[str, Any]
    capabilities: list[str]


class OllamaModels(msgspec.Struct, frozen=True, kw_only=True):
    models: list[dict[str, Any]]


class OllamaEmbeddings(msgspec.Struct, frozen=True, kw_only=True):
    """A vector of length 1 for each text."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbedding(msgspec.Struct, frozen=True, kw_only=True):
    embedding: list[float]


class PullStatus(msgspec.Struct, frozen=True, kw_only=True):
    status: str


class Version(msgspec.Struct, frozen=True, kw_only=True):
    version: str
