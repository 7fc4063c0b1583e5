"""OpenAI's requests, with the extra fields that SGLang's clients send.

Fields and defaults: OpenAI's API reference and parity with SGLang 0.5.8. A null counts as absent.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sapwood.frontends.peer_fields import BOOKKEEPING, CLIENT, GENERATION, IMAGE_SIZES, REPLICA
from sapwood.frontends.serving.sampling import SamplingFields
from sapwood.schema.fields import (
    Alias,
    Count,
    FieldTable,
    Int64,
    NotOffered,
    PenaltyWindow,
    TokenId,
)
from sapwood.schema.limits import CacheKey, Host, NumSamples, ProcessorText, RequestId, RoutingKey

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a stream.

    include_usage           whether there is a last event with the usage
    continuous_usage_stats  whether every event has the usage so far
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's field of that name; at most one of them may be set."""

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | dict[str, Any] | None = None


class GenerationRequest(SamplingFields, msgspec.Struct, frozen=True, kw_only=True):
    """The common fields of chat completions and completions.

    max_tokens and min_tokens are max_new_tokens and min_new_tokens in SamplingParams. At most one
    field may constrain the output: response_format, SGLang's json_schema, regex, ebnf and
    structural_tag, vLLM's structured_outputs, or one of its older guided_*.

    add_special_tokens     whether the tokenizer adds BOS or EOS; default: to completions only,
                           since chat templates write them
    repeat_last_n          penalties count that many of the last tokens; 0: none, -1: all
    cache_salt, extra_key  prompts share cached prefixes only if both fields agree; one for all
                           prompts, or one for each
    lora_path              the name of a loaded LoRA adapter, for all prompts or one for each; an
                           adapter in `model` ("base:adapter") wins
    bootstrap_room         the prompt is read by the engine at bootstrap_host and bootstrap_port,
                           and answered by another one; both get this request
    return_hidden_states   answer with the hidden state of the last computed token
    return_routed_experts  answer with the experts that computed each token, as sglext
    return_cached_tokens_details  answer with where the cached tokens came from, as sglext
    """

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: NumSamples = 1
    max_tokens: Count | None = None
    min_tokens: Count = 0
    repeat_last_n: PenaltyWindow = -1
    seed: int | None = None
    custom_logit_processor: ProcessorText | None = None
    custom_params: dict[str, Any] = {}
    rid: RequestId | list[RequestId] | None = None
    extra_key: CacheKey | list[CacheKey] = ""
    lora_path: str | list[str | None] | None = None
    cache_salt: CacheKey | list[CacheKey] = ""
    priority: Int64 | None = None
    routing_key: RoutingKey = ""
    data_parallel_rank: Int64 | None = None
    bootstrap_host: Host | list[Host | None] | None = None
    bootstrap_port: Int64 | list[Int64 | None] | None = None
    bootstrap_room: Int64 | list[Int64 | None] | None = None
    return_hidden_states: bool = False
    return_routed_experts: bool = False
    return_cached_tokens_details: bool = False
    response_format: dict[str, Any] | None = None
    json_schema: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    add_special_tokens: bool | None = None


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


OWN_PREPARING = NotOffered(why="the model's files say how its pictures are prepared")
_OTHER_SAMPLER = "a parameter of a sampler that is off unless another field turns it on"
_ONE_SAMPLER = "there is no such sampler"
_NO_BEAMS = "there is no beam search"
_NO_IDS = "answers have texts; /generate has token ids too"

_CHANGES_NOTHING: dict[str, str] = {
    **BOOKKEEPING,
    **CLIENT,
    **IMAGE_SIZES,
    # vLLM
    "truncation_side": "prompts are not cut",
    "guided_decoding_backend": "the server's options choose it",
    "return_mm_kwargs": "a field of vLLM's render routes",
    "session_id": "requests share the cache, whatever their session",
    # llama.cpp's server
    "adaptive_decay": _OTHER_SAMPLER,
    "backend_sampling": "where tokens are drawn changes no answer",
    "cache_prompt": "the prefix cache is always on, and changes no answer",
    "dry_allowed_length": _OTHER_SAMPLER,
    "dry_base": _OTHER_SAMPLER,
    "dry_penalty_last_n": _OTHER_SAMPLER,
    "dry_sequence_breakers": _OTHER_SAMPLER,
    "dynatemp_exponent": _OTHER_SAMPLER,
    "id_slot": "requests share the cache, whatever their slot",
    "mirostat_eta": _OTHER_SAMPLER,
    "mirostat_tau": _OTHER_SAMPLER,
    "n_cache_reuse": "a rule of llama.cpp's cache",
    "penalize_nl": "llama.cpp ignores it, too, since the end of 2024",
    "preserved_tokens": "parsers see the tokens that they need",
    "speculative.n_max": "speculation changes no answer",
    "speculative.n_min": "speculation changes no answer",
    "speculative.ngram_m_hits": "speculation changes no answer",
    "speculative.ngram_size_m": "speculation changes no answer",
    "speculative.ngram_size_n": "speculation changes no answer",
    "speculative.p_min": "speculation changes no answer",
    "speculative.type": "speculation changes no answer",
    "sse_ping_interval": "streams have no pings",
    "xtc_threshold": _OTHER_SAMPLER,
}

_CHAIN = ["dry", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]
_LLAMA_CPP_SAMPLERS = (_CHAIN, ["penalties", "dry", "top_n_sigma", *_CHAIN[1:]])
"""Defaults of older and newer versions, which clients send along; they ask for nothing else."""

_LEFT_OUT: dict[str, tuple[object, ...]] = {"max_tokens": (-1,)}

_NOT_OFFERED: dict[str, NotOffered] = {
    **{name: one for name, one in GENERATION.items() if name != "return_cached_tokens_details"},
    "media_io_kwargs": OWN_PREPARING,
    "mm_processor_kwargs": OWN_PREPARING,
    "moderation": NotOffered(why="nothing is moderated"),
    # vLLM
    "bad_words": NotOffered(why="logit_bias keeps tokens away"),
    "early_stopping": NotOffered(why=_NO_BEAMS),
    "ec_transfer_params": NotOffered(why="encoding and decoding are not apart here"),
    "guided_whitespace_pattern": NotOffered(why="the grammar's backend chooses the white space"),
    "kv_transfer_params": NotOffered(why="prefill and decoding are not apart here"),
    "length_penalty": NotOffered(why=_NO_BEAMS, idle=(1.0,)),
    "logits_processors": NotOffered(why="custom_logit_processor names one"),
    "logprob_token_ids": NotOffered(why="top_logprobs lists the likeliest tokens"),
    "prompt_logprobs": NotOffered(why="completions with echo and logprobs have them"),
    "repetition_detection": NotOffered(why="repetition_penalty works against them"),
    "return_assistant_tokens_mask": NotOffered(why=_NO_IDS),
    "return_prompt_text": NotOffered(why="answers do not repeat the prompt"),
    "return_token_offsets": NotOffered(why=_NO_IDS),
    "return_token_ids": NotOffered(why=_NO_IDS),
    "return_tokens_as_token_ids": NotOffered(why=_NO_IDS),
    "routed_experts_prompt_start": NotOffered(why="the experts of all tokens are told", idle=(0,)),
    "stream_interval": NotOffered(why="every token is sent as it comes", idle=(1,)),
    "truncate_prompt_tokens": NotOffered(why="a prompt that is too long is refused, not cut"),
    "use_beam_search": NotOffered(why=_NO_BEAMS),
    "vllm_xargs": NotOffered(why="they are for vLLM's plugins"),
    "watermarking": NotOffered(why="outputs have no watermark"),
    # llama.cpp's server
    "adaptive_target": NotOffered(why=_ONE_SAMPLER, idle=(-1.0,)),
    "dry_multiplier": NotOffered(why=_ONE_SAMPLER, idle=(0.0,)),
    "dynatemp_range": NotOffered(why=_ONE_SAMPLER, idle=(0.0,)),
    "grammar_lazy": NotOffered(why="a grammar holds from the first token on"),
    "grammar_triggers": NotOffered(why="a grammar holds from the first token on", idle=([],)),
    "lora": NotOffered(why="lora_path names an adapter", idle=([],)),
    "min_keep": NotOffered(why=_ONE_SAMPLER, idle=(0,)),
    "mirostat": NotOffered(why=_ONE_SAMPLER, idle=(0,)),
    "n_discard": NotOffered(why="a context that is full ends the answer", idle=(0,)),
    "n_indent": NotOffered(why="it is for code infilling", idle=(0,)),
    "n_keep": NotOffered(why="a context that is full ends the answer", idle=(0, -1)),
    "n_probs": NotOffered(why="logprobs and top_logprobs have them", idle=(0,)),
    "post_sampling_probs": NotOffered(why="log probabilities are the model's own"),
    "response_fields": NotOffered(why="answers have all their fields"),
    "return_progress": NotOffered(why="events begin with the first token"),
    "return_tokens": NotOffered(why=_NO_IDS),
    "samplers": NotOffered(why="their order is fixed", idle=_LLAMA_CPP_SAMPLERS),
    "t_max_predict_ms": NotOffered(why="max_tokens bounds an answer", idle=(0, -1)),
    "t_max_prompt_ms": NotOffered(why="max_tokens bounds an answer", idle=(0, -1)),
    "timings_per_token": NotOffered(why="/metrics has times"),
    "top_n_sigma": NotOffered(why=_ONE_SAMPLER, idle=(-1.0,)),
    "typical_p": NotOffered(why=_ONE_SAMPLER, idle=(1.0,)),
    "xtc_probability": NotOffered(why=_ONE_SAMPLER, idle=(0.0,)),
}

_ALIASES: dict[str, Alias] = {
    **REPLICA,
    "grammar": Alias(of="ebnf", idle=("",)),
    "include_stop_str_in_output": Alias(of="no_stop_trim"),
    "n_predict": Alias(of="max_tokens", idle=(-1, -2)),
    "repeat_penalty": Alias(of="repetition_penalty"),
    "request_id": Alias(of="rid", idle=("",)),
}

STREAM_OPTIONS_FIELDS = FieldTable(
    title="stream_options of /v1/chat/completions and /v1/completions",
    shape=StreamOptions,
    changes_nothing={"include_obfuscation": "events are never padded"},
)

STRUCTURED_OUTPUTS_FIELDS = FieldTable(
    title="structured_outputs of /v1/chat/completions and /v1/completions",
    shape=StructuredOutputs,
    not_offered={
        "disable_additional_properties": NotOffered(why="the schema says whether there are any"),
        "disable_any_whitespace": NotOffered(why="the grammar's backend chooses the white space"),
        "disable_fallback": NotOffered(why="the server's options choose the backend"),
        "whitespace_pattern": NotOffered(why="the grammar's backend chooses the white space"),
    },
)

_NESTED: dict[str, FieldTable[Any]] = {
    "stream_options": STREAM_OPTIONS_FIELDS,
    "structured_outputs": STRUCTURED_OUTPUTS_FIELDS,
}

COMPLETION_FIELDS = FieldTable(
    title="POST /v1/completions",
    shape=CompletionRequest,
    left_out=_LEFT_OUT,
    aliases=_ALIASES,
    changes_nothing=_CHANGES_NOTHING,
    not_offered={
        **_NOT_OFFERED,
        "prompt_embeds": NotOffered(why="/generate takes input_embeds"),
        "suffix": NotOffered(why="the model only goes on with a text"),
    },
    nested=_NESTED,
)

CHAT_FIELDS = FieldTable(
    title="POST /v1/chat/completions",
    shape=ChatRequest,
    left_out=_LEFT_OUT,
    aliases={
        **_ALIASES,
        "reasoning_budget_tokens": Alias(of="thinking_budget", idle=(-1,)),
        "thinking_budget_tokens": Alias(of="thinking_budget", idle=(-1,)),
        "thinking_token_budget": Alias(of="thinking_budget"),
    },
    changes_nothing={
        **_CHANGES_NOTHING,
        "prediction": "a guess of the answer only makes it faster",
    },
    not_offered={
        **_NOT_OFFERED,
        "audio": NotOffered(why="answers are texts"),
        "chat_template": NotOffered(why="the server has one; start it with --chat-template"),
        "echo": NotOffered(why="completions have it"),
        "function_call": NotOffered(why="send tool_choice", idle=("none", "auto")),
        "functions": NotOffered(why="send tools"),
        "include_reasoning": NotOffered(why="reasoning is always told", idle=(True,)),
        "modalities": NotOffered(why="answers are texts", idle=(["text"],)),
        "parse_tool_calls": NotOffered(why="calls are always parsed", idle=(True,)),
        "reasoning_budget_message": NotOffered(why="thinking ends without a message", idle=("",)),
        "reasoning_format": NotOffered(
            why="separate_reasoning says whether it is apart", idle=("auto", "deepseek")
        ),
        "thinking_forced_open": NotOffered(why="the chat template says so"),
        "verbosity": NotOffered(why="templates have no such word", idle=("medium",)),
        "web_search_options": NotOffered(why="the server does not search"),
    },
    nested=_NESTED,
)

MESSAGE_FIELDS = FieldTable(
    title="messages[] of /v1/chat/completions",
    shape=Message,
    aliases={"reasoning": Alias(of="reasoning_content")},
    not_offered={
        "annotations": NotOffered(why="templates have no place for them"),
        "audio": NotOffered(why="the server takes no sound"),
        "function_call": NotOffered(why="send tool_calls"),
        "refusal": NotOffered(why="send it as content"),
    },
)

PART_FIELDS = FieldTable(
    title="messages[].content[] of /v1/chat/completions",
    shape=TextPart,
    changes_nothing={"cache_control": "prefixes are always cached"},
)
