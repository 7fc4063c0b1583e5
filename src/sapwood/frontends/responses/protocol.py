"""POST /v1/responses. Source: OpenAI's API reference; extra fields: parity with SGLang 0.5.8."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from sapwood.frontends.common.fields import Count, Int64, Rules

Metadata = Annotated[
    dict[Annotated[str, msgspec.Meta(max_length=64)], Annotated[str, msgspec.Meta(max_length=512)]],
    msgspec.Meta(max_length=16),
]


class ResponseStreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a stream. include_obfuscation has no effect: events are never padded here."""

    include_obfuscation: Literal[False] = False


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/responses. A null counts as absent.

    input                 the user's text, or a list of items: messages, function calls, their
                          outputs, reasoning
    instructions          a system message for this answer only
    previous_response_id  a response whose input and output come before `input`
    store                 whether the response is kept, so that it can be read and continued;
                          default: true if the server has a store
    background            answer at once, and generate later; needs the store
    top_logprobs          alternatives per output token, with include "message.output_text.logprobs"
    stop … cache_salt     as in chat completions
    """

    input: str | list[dict[str, Any]] = []
    model: str = ""
    instructions: str = ""
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool = False
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    include: list[str] = []
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] = 0
    text: dict[str, Any] = {}
    reasoning: dict[str, Any] = {}
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool | None = None
    metadata: Metadata = {}
    truncation: Literal["disabled"] = "disabled"
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    stop: str | list[str] = []
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    min_tokens: Count | None = None
    ignore_eos: bool = False
    priority: Int64 | None = None
    routing_key: str = ""
    extra_key: str = ""
    cache_salt: str = ""


PASSED_ON = (
    "temperature",
    "top_p",
    "stop",
    "frequency_penalty",
    "presence_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
    "priority",
    "routing_key",
    "extra_key",
    "cache_salt",
    "parallel_tool_calls",
)
"""Fields that mean the same in chat completions."""

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = frozenset({LOGPROBS})

REQUEST_RULES = Rules(
    # This limits calls to tools that OpenAI runs itself; there are none here.
    informational=frozenset({"max_tool_calls", "prompt_cache_retention", "prompt_cache_options"}),
    unsupported={
        "conversation": (),
        "prompt": (),
        "moderation": (),
        "context_management": (),
        "access_programs": (),
        "image": (),
    },
)


class TextFields(msgspec.Struct, frozen=True, kw_only=True):
    """`text`: the format of the answer."""

    format: dict[str, Any] = {}


TEXT_RULES = Rules(unsupported={"verbosity": ("medium",)})


class ReasoningFields(msgspec.Struct, frozen=True, kw_only=True):
    """`reasoning`; effort as in chat completions."""

    effort: str | None = None


# The whole reasoning is sent, not a summary.
REASONING_RULES = Rules(
    unsupported={"summary": ("auto",), "generate_summary": ("auto",), "context": ("auto",)}
)


class MessageItem(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    type: Literal["message"] = "message"


class CallItem(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutputItem(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[dict[str, Any]]


class ReasoningItem(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["reasoning"]
    content: list[dict[str, Any]] = []


ITEM_RULES = Rules(
    informational=frozenset({"id", "status", "phase", "summary"}),
    unsupported={"encrypted_content": (), "namespace": (), "caller": (), "async": ()},
)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message's content, of an output or of a reasoning."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "refusal"]
    text: str = ""
    refusal: str = ""


PART_RULES = Rules(informational=frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"}))


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


TOOL_RULES = Rules(
    unsupported={"defer_loading": (), "async": (), "output_schema": (), "allowed_callers": ()}
)


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """A response as the API shows it."""

    id: str
    object: Literal["response"]
    created_at: float
    completed_at: float | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: dict[str, Any] | None
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    service_tier: str


class ResponseDeleted(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    deleted: bool


class ResponseItems(msgspec.Struct, frozen=True, kw_only=True):
    object: str
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
