"""Anthropic's requests. Source: the reference of its Messages API. A null counts as absent."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from sapwood.schema.fields import Count, FieldTable, NotOffered

T = TypeVar("T", bound=msgspec.Struct)


class CountTokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/messages/count_tokens.

    system       a text, or a list of text blocks
    tools        functions that the client runs; tool_choice: {"type": "auto", "any", "tool"
                 (with a name) or "none"}, and whether it may call several at once
    thinking     {"type": "enabled", "budget_tokens"}, {"type": "adaptive"} or
                 {"type": "disabled"}; left out: as the model does
    output_config  how much to think, and a JSON Schema that the answer matches
    output_format  an older place of output_config.format
    """

    messages: list[dict[str, Any]]
    model: str = ""
    system: str | list[dict[str, Any]] = ""
    tools: list[dict[str, Any]] = []
    tool_choice: dict[str, Any] = {}
    thinking: dict[str, Any] = {}
    output_config: dict[str, Any] = {}
    output_format: dict[str, Any] | None = None


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


class ImageBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A picture of the user, or in the result of a tool."""

    type: str
    source: dict[str, Any]


class ImageSource(msgspec.Struct, frozen=True, kw_only=True):
    """`source` of a picture: base64 with media_type and data, or url with an http or https URL."""

    type: Literal["base64", "url"]
    media_type: str = ""
    data: str = ""
    url: str = ""


class ThinkingBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A block of thinking. The signature is Anthropic's proof of its origin, and unused here."""

    type: str
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(msgspec.Struct, frozen=True, kw_only=True):
    """Thinking that Anthropic encrypted; the server takes the block and passes over it."""

    type: str
    data: str = ""


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


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`output_config`.

    effort  how much to think, if the model thinks
    format  {"type": "json_schema", "schema": …}, which the answer's text matches
    """

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class FormatFields(msgspec.Struct, frozen=True, kw_only=True):
    """`output_config.format`."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


_ACCOUNTS = "it says who asks and who pays"

_CHANGES_NOTHING: dict[str, str] = {
    "anthropic_version": "the header of that name in the body, as cloud hosts have it",
    "betas": "the header anthropic-beta in the body, as cloud hosts have it",
    "billing_policy": _ACCOUNTS,
    "cache_control": "prefixes are always cached",
    "diagnostics": "a request for a report to Anthropic's console",
    "fallback_credit_token": _ACCOUNTS,
    "metadata": _ACCOUNTS,
    "service_tier": _ACCOUNTS,
    "user_profile_id": _ACCOUNTS,
    "workspace_id": _ACCOUNTS,
}
_NOT_OFFERED: dict[str, NotOffered] = {
    "compaction": NotOffered(why="a conversation is never shortened"),
    "container": NotOffered(why="the server runs no code"),
    "context_management": NotOffered(
        why="a conversation is never shortened",
        idle=({"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
    ),
    "fallbacks": NotOffered(why="the server has one model"),
    "inference_geo": NotOffered(why="the model runs where the server runs"),
    "mcp_servers": NotOffered(why="the server runs no tools"),
    "speed": NotOffered(why="there is one speed", idle=("standard",)),
    "thread": NotOffered(why="send the whole conversation"),
}

MESSAGES_FIELDS = FieldTable(
    title="POST /v1/messages",
    shape=MessagesRequest,
    changes_nothing=_CHANGES_NOTHING,
    not_offered=_NOT_OFFERED,
)

COUNT_FIELDS = FieldTable(
    title="POST /v1/messages/count_tokens",
    shape=CountTokensRequest,
    changes_nothing=_CHANGES_NOTHING,
    not_offered=_NOT_OFFERED,
)

OUTPUT_FIELDS = FieldTable(
    title="output_config of /v1/messages",
    shape=OutputConfig,
    not_offered={"task_budget": NotOffered(why="max_tokens bounds an answer")},
)
FORMAT_FIELDS = FieldTable(title="output_config.format of /v1/messages", shape=FormatFields)

TURN_FIELDS = FieldTable(title="messages[] of /v1/messages", shape=Turn)


def _block_table(kind: str, shape: type[T]) -> FieldTable[T]:
    return FieldTable(
        title=f"messages[].content[] of /v1/messages, type {kind}",
        shape=shape,
        changes_nothing={"cache_control": "prefixes are always cached"},
        not_offered={
            "caller": NotOffered(why="the server runs no tools", idle=({"type": "direct"},)),
            "citations": NotOffered(why="answers cite nothing", idle=({"enabled": False},)),
        },
    )


TEXT_FIELDS = _block_table("text", TextBlock)
THINKING_BLOCK_FIELDS = _block_table("thinking", ThinkingBlock)
REDACTED_FIELDS = _block_table("redacted_thinking", RedactedThinkingBlock)
TOOL_USE_FIELDS = _block_table("tool_use", ToolUseBlock)
TOOL_RESULT_FIELDS = _block_table("tool_result", ToolResultBlock)

IMAGE_FIELDS = _block_table("image", ImageBlock)
IMAGE_SOURCE_FIELDS = FieldTable(
    title="messages[].content[].source of /v1/messages",
    shape=ImageSource,
    not_offered={"file_id": NotOffered(why="send the picture as base64 or url")},
)

TOOL_FIELDS = FieldTable(
    title="tools[] of /v1/messages",
    shape=ToolFields,
    changes_nothing={
        "cache_control": "prefixes are always cached",
        "eager_input_streaming": "a call is sent as soon as it is complete",
    },
    not_offered={
        "allowed_callers": NotOffered(why="only the model calls", idle=(["direct"],)),
        "defer_loading": NotOffered(why="the model sees all tools"),
        "input_examples": NotOffered(why="templates have no place for them"),
    },
)

CHOICE_FIELDS = FieldTable(title="tool_choice of /v1/messages", shape=ChoiceFields)

THINKING_FIELDS = FieldTable(
    title="thinking of /v1/messages",
    shape=ThinkingFields,
    not_offered={
        # Anthropic's omitted thinking travels in the signature. Here the text is the only way in
        # which it comes back with the next request, so a client gets it whatever it shows.
        "display": NotOffered(
            why="thinking is sent whole", idle=("summarized", "omitted", "updates")
        )
    },
)
