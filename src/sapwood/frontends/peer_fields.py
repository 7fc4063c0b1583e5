"""Fields that several dialects share and the server has no use for. Facts: SGLang 0.5.8, 0.5.9."""

from __future__ import annotations

from sapwood.schema.fields import Alias, NotOffered

_ROUTERS = "bookkeeping of SGLang's router and of its own processes"

BOOKKEEPING: dict[str, str] = {
    "background": _ROUTERS,
    "conversation_id": _ROUTERS,
    "external_trace_header": "spans follow the header traceparent",
    "http_worker_ipc": _ROUTERS,
    "log_metrics": "metrics count every request",
    "need_wait_for_image": _ROUTERS,
    "need_wait_for_mm_inputs": _ROUTERS,
    "no_logs": "the server's options say what is logged",
    "num_items_assigned": _ROUTERS,
    "received_time": _ROUTERS,
    "received_time_perf": _ROUTERS,
    "validation_time": _ROUTERS,
}

CLIENT: dict[str, str] = dict.fromkeys(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    ),
    "it says who asks, or how the provider keeps and bills the answer",
)

IMAGE_SIZES: dict[str, str] = dict.fromkeys(
    (
        "max_dynamic_patch",
        "min_dynamic_patch",
        "image_max_dynamic_patch",
        "video_max_dynamic_patch",
    ),
    "the object with a picture's url says into how many tiles it may be cut",
)

_NO_ADAPTERS = NotOffered(why="lora_path names an adapter, where there are any")
_NO_TRANSFER = NotOffered(why="/generate, /v1/completions and /v1/chat/completions have it")
_NO_SPLIT = NotOffered(why="engines that hand pages over have one replica", idle=(0,))

REPLICA: dict[str, Alias] = {"routed_dp_rank": Alias(of="data_parallel_rank")}
"""SGLang's newer name."""

PLACEMENT: dict[str, NotOffered] = {
    "bootstrap_host": _NO_TRANSFER,
    "bootstrap_pair_key": NotOffered(why="the room alone tells requests apart"),
    "bootstrap_port": _NO_TRANSFER,
    "bootstrap_room": _NO_TRANSFER,
    "data_parallel_rank_decode": _NO_SPLIT,
    "decode_tp_size": NotOffered(why="engines that hand pages over have one rank", idle=(1,)),
    "disagg_prefill_dp_rank": _NO_SPLIT,
    "lora_id": _NO_ADAPTERS,
    "lora_path": NotOffered(why="adapters are for text; this route makes numbers"),
}

PLACES = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
"""Where a prompt's pages are handed over; see schema/handover.py."""

HANDED_OVER: dict[str, NotOffered] = dict.fromkeys(PLACES, _NO_TRANSFER)

GENERATION: dict[str, NotOffered] = {
    **{name: field for name, field in PLACEMENT.items() if name not in ("lora_path", *PLACES)},
    "custom_labels": NotOffered(why="labels of metrics come in a header"),
    "return_bytes": NotOffered(why="answers are JSON"),
    "return_cached_tokens_details": NotOffered(
        why="/generate, /v1/completions and /v1/chat/completions tell them"
    ),
    "return_entropy": NotOffered(why="answers have no entropies"),
    "routed_experts_start_len": NotOffered(why="the experts of all tokens are told", idle=(0,)),
    "session_params": NotOffered(why="sessions are for /generate"),
}

ROUTED_EXPERTS: dict[str, NotOffered] = {
    "return_routed_experts": NotOffered(
        why="/generate, /v1/completions and /v1/chat/completions tell them"
    ),
}

MEDIA: dict[str, NotOffered] = {
    "audio_data": NotOffered(why="the server takes no sound"),
    "image_data": NotOffered(why="the server takes only text"),
    "modalities": NotOffered(why="the server takes only text", idle=(["text"],)),
    "video_data": NotOffered(why="the server takes only text"),
}
