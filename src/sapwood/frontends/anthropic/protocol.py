"""Anthropic's requests. Source: the reference of its Messages API. A null counts as absent."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sapwood.frontends.common.fields import Count, Rules


class CountTokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/messages/count_tokens.

    system       a text, or a list of text blocks
    tools        functions that the client runs; tool_choice: {"type": "auto", "any", "tool"
                 (with a name) or "none"}, and whether it may call several at once
    thinking     {"type": "enabled", "budget_tokens"}, {"type": "adaptive"} or
                 {"type": "disabled"}; left out: as the model does
    """

    messages: list[dict[str, Any]]
    model: str = ""
    system: str | list[dict[str, Any]] = ""
    tools: list[dict[str, Any]] = []
    tool_choice: dict[str, Any] = {}
    thinking: dict[str, Any] = {}


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
    """One of `messages`; content is a text, or a list of blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class TextBlock(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    text: str


class ThinkingBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A block of thinking. The signature is Anthropic's proof of its origin, and unused here."""

    type: str
    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    tool_use_id: str
    content: str | list[dict[str, Any]] = ""
    is_error: bool = False


class ToolFields(msgspec.Struct, frozen=True, kw_only=True):
    """One of `tools`."""

    name: str
    input_schema: dict[str, Any]
    type: str = "custom"
    description: str | None = None
    strict: bool = False


class ChoiceFields(msgspec.Struct, frozen=True, kw_only=True):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingFields(msgspec.Struct, frozen=True, kw_only=True):
    """`thinking`."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None


_UNSUPPORTED: dict[str, tuple[object, ...]] = {
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

BLOCK_RULES = Rules(
    informational=frozenset({"cache_control"}),
    unsupported={"citations": (), "caller": ({"type": "direct"},)},
)

# Calls are streamed as soon as they are complete, whatever is asked.
TOOL_RULES = Rules(
    informational=frozenset({"cache_control", "eager_input_streaming"}),
    unsupported={
        "defer_loading": (),
        "allowed_callers": (["direct"],),
        "input_examples": (),
    },
)

CHOICE_RULES = Rules()

THINKING_RULES = Rules(unsupported={"display": ("summarized",)})
