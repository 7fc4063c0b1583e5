"""POST /v1/responses. Source: OpenAI's API reference; extra fields: parity with SGLang 0.5.8."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from sapwood.frontends.openai.protocol import (
    OWN_PREPARING,
    STRUCTURED_OUTPUTS_FIELDS,
    StructuredOutputs,
)
from sapwood.frontends.peer_fields import (
    BOOKKEEPING,
    GENERATION,
    HANDED_OVER,
    REPLICA,
    ROUTED_EXPERTS,
)
from sapwood.schema.fields import (
    Alias,
    Count,
    FieldTable,
    Int64,
    NotOffered,
    TokenId,
)
from sapwood.schema.limits import CacheKey, CallerText, Metadata, RoutingKey

T = TypeVar("T", bound=msgspec.Struct)


class ResponseStreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a stream, none of which has an effect here."""


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/responses. A null counts as absent.

    input                 the user's text, or a list of items: messages, function calls, their
                          outputs, reasoning
    instructions          a system message for this answer only
    previous_response_id  a response whose input and output come before `input`
    store                 whether the response is kept, so that it can be read and continued;
                          default: true if the server has a store
    background            answer at once, and generate later; needs the store
    truncation            "auto" is taken, but a conversation that is too long is refused either way
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
    truncation: Literal["auto", "disabled"] = "disabled"
    user: CallerText | None = None
    safety_identifier: CallerText | None = None
    prompt_cache_key: CallerText | None = None
    service_tier: CallerText | None = None
    stop: str | list[str] = []
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    min_tokens: Count | None = None
    logit_bias: dict[TokenId, float] = {}
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None
    ignore_eos: bool = False
    priority: Int64 | None = None
    routing_key: RoutingKey = ""
    data_parallel_rank: Int64 | None = None
    extra_key: CacheKey = ""
    cache_salt: CacheKey = ""
    no_stop_trim: bool = False


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
    "data_parallel_rank",
    "extra_key",
    "cache_salt",
    "parallel_tool_calls",
    "logit_bias",
    "skip_special_tokens",
    "structured_outputs",
    "no_stop_trim",
)
"""Fields that mean the same in chat completions."""

LOGPROBS = "message.output_text.logprobs"
INCLUDED_ANYWAY = frozenset(
    {
        # A reasoning item has its text, which can be sent back.
        "reasoning.encrypted_content",
        # Of items that no answer has here.
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
"""Entries of `include` that change nothing."""

STREAM_OPTIONS_FIELDS = FieldTable(
    title="stream_options of /v1/responses",
    shape=ResponseStreamOptions,
    changes_nothing={
        "include_obfuscation": "events are never padded",
        "include_usage": "the last event has the usage",
    },
)

REQUEST_FIELDS = FieldTable(
    title="POST /v1/responses",
    shape=ResponsesRequest,
    aliases={"include_stop_str_in_output": Alias(of="no_stop_trim"), **REPLICA},
    changes_nothing={
        **{name: why for name, why in BOOKKEEPING.items() if name != "background"},
        "max_tool_calls": "a limit on the tools of OpenAI's servers, and there are none",
        "prompt_cache_options": "prefixes are always cached",
        "prompt_cache_retention": "prefixes are always cached",
        "request_id": "the server makes a response's id",
    },
    not_offered={
        **GENERATION,
        **HANDED_OVER,
        **ROUTED_EXPERTS,
        "access_programs": NotOffered(why="the server runs no tools"),
        "background_options": NotOffered(why="all responses in the background are alike"),
        "context_management": NotOffered(why="a conversation is never shortened"),
        "conversation": NotOffered(why="send previous_response_id"),
        "enable_response_messages": NotOffered(why="a response has items only"),
        "image": NotOffered(why="answers are texts"),
        "mm_processor_kwargs": OWN_PREPARING,
        "kv_transfer_params": NotOffered(why="prefill and decoding are not apart here"),
        "moderation": NotOffered(why="nothing is moderated"),
        "previous_input_messages": NotOffered(why="send previous_response_id or input"),
        "prompt": NotOffered(why="there are no prompt templates here"),
        "vllm_xargs": NotOffered(why="they are for vLLM's plugins"),
    },
    nested={
        "stream_options": STREAM_OPTIONS_FIELDS,
        "structured_outputs": STRUCTURED_OUTPUTS_FIELDS,
    },
)


class TextFields(msgspec.Struct, frozen=True, kw_only=True):
    """`text`: the format of the answer."""

    format: dict[str, Any] = {}


TEXT_FIELDS = FieldTable(
    title="text of /v1/responses",
    shape=TextFields,
    not_offered={"verbosity": NotOffered(why="templates have no such word", idle=("medium",))},
)


class ReasoningFields(msgspec.Struct, frozen=True, kw_only=True):
    """`reasoning`; effort as in chat completions."""

    effort: str | None = None


_NO_SUMMARY = NotOffered(why="the whole reasoning is sent, not a summary", idle=("auto",))

REASONING_FIELDS = FieldTable(
    title="reasoning of /v1/responses",
    shape=ReasoningFields,
    not_offered={
        "context": NotOffered(why="the template says which reasoning is kept", idle=("auto",)),
        "generate_summary": _NO_SUMMARY,
        "mode": NotOffered(why="there is one mode", idle=("standard",)),
        "summary": _NO_SUMMARY,
    },
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
    """encrypted_content is OpenAI's copy of the content, which only its servers can read."""

    type: Literal["reasoning"]
    content: list[dict[str, Any]] = []
    encrypted_content: str = ""


_ITEM_CHANGES_NOTHING = {
    "id": "the server makes an item's id",
    "phase": "a note of OpenAI's servers",
    "status": "an item that is sent is complete",
    "summary": "the reasoning's content is read",
}
_ITEM_NOT_OFFERED = {
    "async": NotOffered(why="calls are made in turn"),
    "caller": NotOffered(why="the server runs no tools"),
    "namespace": NotOffered(why="tools have names only"),
}


def _item_table(kind: str, shape: type[T]) -> FieldTable[T]:
    return FieldTable(
        title=f"input[] of /v1/responses, type {kind}",
        shape=shape,
        changes_nothing=_ITEM_CHANGES_NOTHING,
        not_offered=_ITEM_NOT_OFFERED,
    )


MESSAGE_FIELDS = _item_table("message", MessageItem)
CALL_FIELDS = _item_table("function_call", CallItem)
CALL_OUTPUT_FIELDS = _item_table("function_call_output", CallOutputItem)
REASONING_ITEM_FIELDS = _item_table("reasoning", ReasoningItem)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message's content, of an output or of a reasoning."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "refusal"]
    text: str = ""
    refusal: str = ""


PART_FIELDS = FieldTable(
    title="input[].content[] of /v1/responses",
    shape=Part,
    changes_nothing={
        "annotations": "templates have no place for them",
        "logprobs": "those of an earlier answer",
        "prompt_cache_breakpoint": "prefixes are always cached",
    },
)


class ImagePart(msgspec.Struct, frozen=True, kw_only=True):
    """A picture in a user's message or in the output of a function.

    image_url  http, https or data URL
    detail     "low": it may be shrunk to 512 pixels a side
    """

    type: Literal["input_image"]
    image_url: str = ""
    detail: Literal["auto", "low", "high", "original"] = "auto"


IMAGE_PART_FIELDS = FieldTable(
    title="input[].content[] of /v1/responses, type input_image",
    shape=ImagePart,
    changes_nothing={"prompt_cache_breakpoint": "prefixes are always cached"},
    not_offered={"file_id": NotOffered(why="send the picture as image_url")},
)


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


TOOL_FIELDS = FieldTable(
    title="tools[] of /v1/responses",
    shape=FunctionTool,
    not_offered={
        "allowed_callers": NotOffered(why="only the model calls", idle=(["direct"],)),
        "async": NotOffered(why="calls are made in turn"),
        "defer_loading": NotOffered(why="the model sees all tools"),
        "output_schema": NotOffered(why="templates have no place for it"),
    },
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
