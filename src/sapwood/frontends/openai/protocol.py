"""OpenAI's requests, with the extra fields that SGLang's clients send.

Fields and defaults: OpenAI's API reference and parity with SGLang 0.5.8. A null counts as absent.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sapwood.frontends.common.fields import Count, Int64, NumSamples, Rules, TokenId

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a stream.

    include_usage           whether there is a last event with the usage
    continuous_usage_stats  whether every event has the usage so far
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The common fields of chat completions and completions.

    Sampling fields mean the same as in SamplingParams; max_tokens and min_tokens are max_new_tokens
    and min_new_tokens there. At most one field may constrain the output: response_format, SGLang's
    json_schema, regex, ebnf and structural_tag, or one of vLLM's guided_*.

    cache_salt, extra_key  prompts share cached prefixes only if both fields agree
    return_hidden_states   answer with the hidden state of the last computed token
    """

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: NumSamples = 1
    max_tokens: Count | None = None
    min_tokens: Count = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[TokenId, float] = {}
    seed: int | None = None
    stop: str | list[str] = []
    stop_regex: str | list[str] = []
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    custom_logit_processor: str | None = None
    custom_params: dict[str, Any] = {}
    rid: str | list[str] | None = None
    extra_key: str = ""
    cache_salt: str = ""
    priority: Int64 | None = None
    routing_key: str = ""
    return_hidden_states: bool = False
    response_format: dict[str, Any] | None = None
    json_schema: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions. Without max_tokens the context is the only limit.

    top_logprobs        with logprobs: number of likeliest tokens that are listed at each position
    separate_reasoning  whether thinking is separated from the answer, as reasoning_content
    stream_reasoning    whether a stream sends thinking as it comes, or all of it at its end
    reasoning_effort    how much to think, in the template's words; "none": not at all
    thinking_budget     tokens of thinking after which the server ends it
    documents           passed to the chat template
    """

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: Int64 | None = None
    max_completion_tokens: Count | None = None
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] = []
    separate_reasoning: bool = True
    stream_reasoning: bool = True
    reasoning_effort: Effort | None = None
    thinking_budget: Count | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions.

    prompt    a text, token ids, or a list of either
    logprobs  answer with log probabilities, and with those of this number of likeliest tokens at
              each position; with echo those of the prompt too
    """

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool = False
    logprobs: Int64 | bool | None = None
    best_of: Int64 | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation; tool calls of earlier turns go to the template."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] = []
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class TextPart(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    text: str


_INFORMATIONAL = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)

_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "lora_path": (),
    "session_params": (),
    "return_routed_experts": (),
    "custom_labels": (),
    "data_parallel_rank": (),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
}

COMPLETION_RULES = Rules(informational=_INFORMATIONAL, unsupported={**_UNSUPPORTED, "suffix": ()})

CHAT_RULES = Rules(
    informational=_INFORMATIONAL,
    unsupported={
        **_UNSUPPORTED,
        "functions": (),
        "function_call": ("none",),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "verbosity": (),
    },
)

MESSAGE_RULES = Rules(
    unsupported={"audio": (), "function_call": (), "refusal": (), "annotations": ()}
)

PART_RULES = Rules(unsupported={"cache_control": ()})
