"""Anthropic's requests. Source: the reference of its Messages API. A null counts as absent."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sapwood.frontends.common.fields import Count, Rules


class CountTokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/messages/count_tokens.

    system  a text, or a list of text blocks
    """

    messages: list[dict[str, Any]]
    model: str = ""
    system: str | list[dict[str, Any]] = ""


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    """POST /v1/messages.

    max_tokens   output tokens at most; 0 only computes the prompt, so that it is cached
    temperature  in [0, 1], as in Anthropic's API
    top_k        keep the k most likely tokens; 0: all
    """

    max_tokens: Count
    stop_sequences: list[str] = []
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One of `messages`; content is a text, or a list of text blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class TextBlock(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    text: str


_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "tools": (),
    "tool_choice": ({"type": "none"}, {"type": "auto"}),
    "thinking": ({"type": "disabled"},),
    "mcp_servers": (),
    "container": (),
    "context_management": (),
    "compaction": (),
    "output_config": (),
    "output_format": (),
    "speed": ("standard",),
    "inference_geo": (),
    "diagnostics": (),
    "fallbacks": (),
    "thread": (),
}

# Prefixes are cached whether or not a client marks them, so cache_control changes nothing.
MESSAGES_RULES = Rules(
    informational=frozenset({"metadata", "service_tier", "cache_control"}),
    unsupported=_UNSUPPORTED,
)

COUNT_RULES = Rules(informational=frozenset({"cache_control"}), unsupported=_UNSUPPORTED)

TURN_RULES = Rules()

BLOCK_RULES = Rules(informational=frozenset({"cache_control"}), unsupported={"citations": ()})
