"""SGLang's own requests. Fields and defaults: parity with SGLang 0.5.8. A null counts as absent."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sapwood.frontends.peer_fields import BOOKKEEPING, GENERATION, IMAGE_SIZES, MEDIA, REPLICA
from sapwood.frontends.serving.sampling import SamplingFields
from sapwood.schema.fields import (
    Count,
    FieldTable,
    Int64,
    NotOffered,
    TokenId,
)
from sapwood.schema.limits import (
    AdapterName,
    AdapterSource,
    CacheKey,
    Host,
    NumSamples,
    ProcessorText,
    RequestId,
    RoutingKey,
)


class SessionFields(msgspec.Struct, frozen=True, kw_only=True):
    """`session_params`: the request goes on from another one of an open session.

    id       what /open_session answered; null: the request is in no session
    rid      the request to go on from; null: it begins a conversation
    offset   so many of that request's tokens are kept, from the end if it is negative; 0: all
    replace  forget the requests after that one; without rid all of the session
    drop_previous_output  leave out that request's output
    """

    id: str | None = None
    rid: RequestId | None = None
    offset: Int64 | None = None
    replace: bool = False
    drop_previous_output: bool = False


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST or PUT /generate. Exactly one of text, input_ids and input_embeds; a list of either is a
    batch.

    sampling_params, rid, extra_key, lora_path, custom_logit_processor, return_hidden_states,
    return_routed_experts, session_params and the fields about log probabilities may be lists in a
    batch, one entry per prompt.

    lora_path                the name of a loaded LoRA adapter; null: the base model
    image_data, video_data   pictures and videos whose markers are in the prompt: a URL, a path in
                             --allowed-local-media-path, base64, or an object with a url; or a list
                             of them; in a batch one for all prompts, or one or a list per prompt
    model                    as in the other dialects: the served model's name, or none
    input_embeds             embeddings instead of prompt tokens: [tokens][hidden size], or a list
                             of such in a batch
    return_hidden_states     answer with the hidden states of prompt and output, after the last norm
    return_routed_experts    answer with the experts that computed each token, in each layer
    return_logprob           answer with the log probabilities of the output tokens
    logprob_start_len        add those of the prompt's tokens after this index; -1: of none
    top_logprobs_num         add those of this number of likeliest tokens at each position
    token_ids_logprob        add those of these tokens at each position
    return_text_in_logprobs  add the tokens' texts beside their ids
    bootstrap_room           the prompt is read by the engine at bootstrap_host and bootstrap_port,
                             and answered by another one; both get this request
    """

    model: str = ""
    text: str | list[str] | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    input_embeds: list[list[float | list[float]]] | None = None
    image_data: str | dict[str, Any] | list[Any] | None = None
    video_data: str | dict[str, Any] | list[Any] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] = {}
    rid: RequestId | list[RequestId] | None = None
    stream: bool = False
    return_logprob: bool | list[bool] = False
    logprob_start_len: Int64 | list[Int64] = -1
    top_logprobs_num: Int64 | list[Int64] = 0
    token_ids_logprob: list[TokenId | list[TokenId]] = []
    return_text_in_logprobs: bool = False
    return_hidden_states: bool | list[bool] = False
    return_routed_experts: bool | list[bool] = False
    custom_logit_processor: ProcessorText | list[ProcessorText | None] | None = None
    extra_key: CacheKey | list[CacheKey] = ""
    lora_path: str | list[str | None] | None = None
    priority: Int64 | None = None
    routing_key: RoutingKey = ""
    data_parallel_rank: Int64 | None = None
    bootstrap_host: Host | list[Host | None] | None = None
    bootstrap_port: Int64 | list[Int64 | None] | None = None
    bootstrap_room: Int64 | list[Int64 | None] | None = None
    session_params: dict[str, Any] | list[dict[str, Any]] = {}


class NativeSampling(SamplingFields, msgspec.Struct, frozen=True, kw_only=True):
    """`sampling_params`: the fields of SamplingParams, but the seed is called sampling_seed.

    At most one of json_schema, regex, ebnf and structural_tag may be given, as text, like in
    SGLang, or as the object itself. The model's own defaults do not apply.
    """

    n: NumSamples = 1
    max_new_tokens: Count = 128
    min_new_tokens: Count = 0
    temperature: float = 1.0
    top_k: Int64 = -1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    sampling_seed: int | None = None
    stream_interval: Count = 1
    custom_params: dict[str, Any] = {}
    json_schema: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None


class LoadAdapterRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /load_lora_adapter: adds an adapter while the server serves.

    lora_name  by which requests name it
    lora_path  a folder on the server, as PEFT's save_pretrained wrote it, or a hub repository
    pinned     whether it stays in memory even if it is the one unused longest
    """

    lora_name: AdapterName
    lora_path: AdapterSource
    pinned: bool = False


class LoadSentAdapterRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /load_lora_adapter_from_tensors: adds an adapter that comes with the request.

    config_dict         what adapter_config.json has
    serialized_tensors  base64 of the tensors
    load_format         what the tensors are: "safetensors", or a pickle of a dict of tensors if the
                        field is left out, as in SGLang. The pickle is read without running it
    """

    lora_name: AdapterName
    config_dict: dict[str, Any]
    serialized_tensors: str
    load_format: Literal["safetensors"] | None = None
    pinned: bool = False


class UnloadAdapterRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /unload_lora_adapter: forgets an adapter, once its open requests have ended."""

    lora_name: AdapterName


class AbortRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /abort_request: ends every open request whose id begins with `rid`, or all requests."""

    rid: RequestId = ""
    abort_all: bool = False


GENERATE_FIELDS = FieldTable(
    title="POST /generate",
    shape=GenerateRequest,
    aliases=REPLICA,
    changes_nothing={
        **BOOKKEEPING,
        **IMAGE_SIZES,
        "modalities": "image_data and video_data say themselves what they bring",
    },
    not_offered={
        **{name: field for name, field in GENERATION.items() if name != "session_params"},
        "audio_data": MEDIA["audio_data"],
        "require_reasoning": NotOffered(why="a grammar waits for the end of thinking by itself"),
    },
)

SESSION_FIELDS = FieldTable(title="session_params of /generate", shape=SessionFields)

SAMPLING_FIELDS = FieldTable(title="sampling_params of /generate", shape=NativeSampling)

LOAD_ADAPTER_FIELDS = FieldTable(
    title="POST /load_lora_adapter",
    shape=LoadAdapterRequest,
    changes_nothing={
        "load_inplace": "a name that is taken is refused; unload the adapter first",
        "is_3d_lora_weight": "the tensors tell",
    },
)

LOAD_SENT_ADAPTER_FIELDS = FieldTable(
    title="POST /load_lora_adapter_from_tensors",
    shape=LoadSentAdapterRequest,
    not_offered={
        "added_tokens_config": NotOffered(why="the vocabulary is the base model's"),
    },
)

UNLOAD_ADAPTER_FIELDS = FieldTable(
    title="POST /unload_lora_adapter",
    shape=UnloadAdapterRequest,
    changes_nothing={"lora_int_id": "adapters are known by their names"},
)

ABORT_FIELDS = FieldTable(title="POST /abort_request", shape=AbortRequest)
