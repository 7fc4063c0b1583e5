"""OpenAI's requests, with the extra fields that SGLang's clients send.

Fields and defaults: OpenAI's API reference and parity with SGLang 0.5.8. A null counts as absent.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sapwood.frontends.common.fields import Count, Int64, NumSamples, Rules, TokenId


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """include_usage: a last event with the usage; continuous_usage_stats: in every event."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What chat completions and completions have in common.

    The sampling fields are SamplingParams's; max_tokens and min_tokens are its max_new_tokens and
    min_new_tokens. cache_salt and extra_key: prompts share cached prefixes only if both agree.
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
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    rid: str | list[str] | None = None
    extra_key: str = ""
    cache_salt: str = ""
    priority: Int64 = 0


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions. Without max_tokens, as much as the context leaves."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Count | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions. prompt: a text, token ids, or a list of either."""

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool = False
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
    "logprobs": (),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
    "structural_tag": (),
    "response_format": ({"type": "text"},),
    "stop_regex": (),
    "lora_path": (),
    "session_params": (),
    "return_hidden_states": (),
    "return_routed_experts": (),
    "custom_logit_processor": (),
    "custom_params": (),
    "custom_labels": (),
    "data_parallel_rank": (),
    "routing_key": (),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
}

COMPLETION_RULES = Rules(informational=_INFORMATIONAL, unsupported={**_UNSUPPORTED, "suffix": ()})

CHAT_RULES = Rules(
    informational=_INFORMATIONAL,
    unsupported={
        **_UNSUPPORTED,
        "top_logprobs": (0,),
        "tools": (),
        "tool_choice": ("none",),
        "parallel_tool_calls": (True,),
        "functions": (),
        "function_call": ("none",),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "verbosity": (),
        "reasoning_effort": (),
        # Without a reasoning parser there is nothing to separate; their defaults are true.
        "separate_reasoning": (True,),
        "stream_reasoning": (True,),
    },
)

MESSAGE_RULES = Rules(
    unsupported={"audio": (), "function_call": (), "refusal": (), "annotations": ()}
)

PART_RULES = Rules(unsupported={"cache_control": ()})
