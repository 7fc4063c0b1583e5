"""The fields that peers' clients and routers send, at the peers' own defaults.

Facts: SGLang 0.5.9 (io_struct, its OpenAI protocol, its router), vLLM's OpenAI protocol,
llama.cpp's server, Ollama's API.
"""

from __future__ import annotations

from typing import Any

HI = [{"role": "user", "content": "Hi"}]

_SGLANG_GENERATE: dict[str, Any] = {
    "text": "Hi", "sampling_params": {"max_new_tokens": 4, "stream_interval": None, "n": 1},
    "model": "unknown", "rid": None, "http_worker_ipc": None, "input_ids": None,
    "input_embeds": None, "image_data": None, "video_data": None, "audio_data": None,
    "return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0,
    "token_ids_logprob": None, "return_text_in_logprobs": False, "stream": False,
    "log_metrics": True, "return_hidden_states": False, "return_routed_experts": False,
    "routed_experts_start_len": 0, "modalities": None, "session_params": None, "lora_path": None,
    "lora_id": None, "custom_logit_processor": None, "bootstrap_host": None,
    "bootstrap_port": None, "bootstrap_room": None, "bootstrap_pair_key": None,
    "decode_tp_size": None, "require_reasoning": False, "data_parallel_rank": 0,
    "background": False, "conversation_id": "c", "priority": None, "extra_key": None,
    "routing_key": None, "no_logs": False, "custom_labels": None, "return_bytes": False,
    "return_entropy": False, "external_trace_header": {"traceparent": "x"},
    "need_wait_for_image": False, "num_items_assigned": None, "max_dynamic_patch": 12,
    "min_dynamic_patch": 1, "image_max_dynamic_patch": None, "video_max_dynamic_patch": None,
    "validation_time": 0.1, "received_time": 1.0, "received_time_perf": 1.0,
}  # fmt: skip

_SGLANG_COMMON: dict[str, Any] = {
    "model": "unknown", "frequency_penalty": 0.0, "logit_bias": None, "n": 1,
    "presence_penalty": 0.0, "response_format": None, "seed": None, "stop": None, "stream": False,
    "stream_options": None, "user": "u", "return_hidden_states": False,
    "return_routed_experts": False, "return_cached_tokens_details": False, "min_tokens": 0,
    "regex": None, "ebnf": None, "stop_token_ids": None, "stop_regex": None,
    "no_stop_trim": False, "ignore_eos": False, "skip_special_tokens": True, "lora_path": None,
    "session_params": None, "custom_logit_processor": None, "custom_params": {},
    "rid": None, "extra_key": None, "cache_salt": None, "priority": None,
    "bootstrap_host": None, "bootstrap_port": None, "bootstrap_room": None,
    "data_parallel_rank": 0,
}  # fmt: skip

_VLLM_COMMON: dict[str, Any] = {
    "use_beam_search": False, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    "length_penalty": 1.0, "stop_token_ids": [], "include_stop_str_in_output": False,
    "ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "truncate_prompt_tokens": None,
    "prompt_logprobs": None, "allowed_token_ids": None, "bad_words": [],
    "add_special_tokens": False, "structured_outputs": None, "guided_json": None,
    "guided_decoding_backend": None, "guided_whitespace_pattern": None, "priority": 0,
    "request_id": "vllm-1", "return_tokens_as_token_ids": None, "return_token_ids": None,
    "cache_salt": None, "kv_transfer_params": None, "vllm_xargs": None,
    "logits_processors": None, "truncation_side": "left", "ec_transfer_params": None,
    "return_prompt_text": None, "return_token_offsets": False,
    "return_assistant_tokens_mask": False, "repetition_detection": None, "logprobs": None,
}  # fmt: skip

_LLAMA_CPP: dict[str, Any] = {
    "samplers": ["dry", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
    "max_tokens": -1, "sse_ping_interval": 30, "speculative.n_max": 16, "n_discard": 0,
    "cache_prompt": True, "id_slot": -1, "n_predict": -1, "repeat_penalty": 1.0,
    "repeat_last_n": 64, "dry_multiplier": 0.0, "dry_base": 1.75, "dry_allowed_length": 2,
    "dry_penalty_last_n": -1, "dry_sequence_breakers": ["\n"], "dynatemp_range": 0.0,
    "dynatemp_exponent": 1.0, "typical_p": 1.0, "top_n_sigma": -1.0, "xtc_probability": 0.0,
    "xtc_threshold": 0.1, "mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1,
    "grammar": "", "n_probs": 0, "min_keep": 0, "n_keep": 0, "n_indent": 0, "n_cache_reuse": 0,
    "t_max_predict_ms": 0, "post_sampling_probs": False, "return_tokens": False,
    "timings_per_token": False, "return_progress": False, "response_fields": None, "lora": [],
}  # fmt: skip

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sglang generate": ("/generate", _SGLANG_GENERATE),
    "sglang chat": (
        "/v1/chat/completions",
        {
            **_SGLANG_COMMON, "messages": HI, "logprobs": False, "top_logprobs": None,
            "max_tokens": None, "max_completion_tokens": 4, "temperature": None, "top_p": None,
            "tools": None, "tool_choice": "auto", "reasoning_effort": "medium", "top_k": None,
            "min_p": None, "repetition_penalty": None, "continue_final_message": False,
            "separate_reasoning": True, "stream_reasoning": True, "chat_template_kwargs": None,
            "max_dynamic_patch": None, "min_dynamic_patch": 1,
        },
    ),
    "sglang completions": (
        "/v1/completions",
        {
            **_SGLANG_COMMON, "prompt": "Hi", "best_of": None, "echo": False, "logprobs": None,
            "max_tokens": 4, "suffix": None, "temperature": 1.0, "top_p": 1.0, "top_k": -1,
            "min_p": 0.0, "json_schema": None, "repetition_penalty": 1.0,
        },
    ),
    "vllm chat": (
        "/v1/chat/completions",
        {
            **_VLLM_COMMON, "messages": HI, "max_tokens": 4, "thinking_token_budget": None,
            "include_reasoning": True, "parallel_tool_calls": True, "echo": False,
            "add_generation_prompt": True, "continue_final_message": False, "documents": None,
            "chat_template": None, "chat_template_kwargs": None, "media_io_kwargs": None,
            "mm_processor_kwargs": None,
        },
    ),
    "vllm completions": (
        "/v1/completions",
        {**_VLLM_COMMON, "prompt": "Hi", "prompt_embeds": None, "suffix": None, "max_tokens": 4},
    ),
    "llama.cpp chat": (
        "/v1/chat/completions",
        {
            **_LLAMA_CPP, "messages": HI, "parse_tool_calls": True,
            "reasoning_format": "auto", "thinking_forced_open": False,
            "thinking_budget_tokens": -1,
        },
    ),
    "openai chat": (
        "/v1/chat/completions",
        {
            "messages": HI, "prediction": {"type": "content", "content": "Hello"},
            "modalities": ["text"], "verbosity": "medium", "functions": [],
            "function_call": "auto", "store": False, "service_tier": "auto",
            "prompt_cache_key": "k", "safety_identifier": "s", "metadata": {"a": "b"},
            "stream_options": None, "web_search_options": None, "audio": None, "max_tokens": 4,
        },
    ),
    "codex": (
        "/v1/responses",
        {
            "model": "default", "instructions": "Be brief.", "input": "Hi", "tools": [],
            "tool_choice": "auto", "parallel_tool_calls": False, "store": False,
            "reasoning": {"effort": "medium", "summary": "auto"},
            "include": ["reasoning.encrypted_content"], "truncation": "auto",
            "text": {"verbosity": "medium"}, "prompt_cache_key": "k", "service_tier": "auto",
        },
    ),
    "sglang responses": (
        "/v1/responses",
        {
            "input": "Hi", "background": False, "include": None, "max_tool_calls": 1,
            "truncation": "disabled", "request_id": "resp_1", "priority": 0, "extra_key": None,
            "cache_salt": None, "frequency_penalty": 0.0, "presence_penalty": 0.0, "stop": None,
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "service_tier": "auto",
            "store": False,
        },
    ),
    "claude code": (
        "/v1/messages",
        {
            # Recorded from `claude -p`, version 2.1.330.
            "model": "default", "max_tokens": 4, "stream": True, "tools": [],
            "thinking": {"type": "adaptive", "display": "omitted"},
            "output_config": {"effort": "high"}, "metadata": {"user_id": "{}"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cc_entrypoint=sdk-cli;"},
                {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
            ],
            "messages": [
                *HI,
                {
                    "role": "system",
                    "content": [
                        {
                            "type": "text", "text": "# Environment",
                            "cache_control": {"type": "ephemeral"},
                        }
                    ],
                },
            ],
        },
    ),
    "ollama chat": (
        "/api/chat",
        {
            "model": "default", "messages": HI, "stream": False, "keep_alive": "5m",
            "truncate": True, "shift": True, "logprobs": False, "top_logprobs": 0,
            "options": {
                "num_ctx": 1_000_000, "repeat_last_n": 64, "repeat_penalty": 1.1, "tfs_z": 1.0,
                "typical_p": 1.0, "mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1,
                "num_keep": 4, "num_predict": 4, "penalize_newline": True, "num_gpu": -1,
                "seed": 0, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0,
                "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop": None,
            },
        },
    ),
}  # fmt: skip
