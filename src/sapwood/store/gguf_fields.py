"""Fields of config.json that only some architectures have, from the metadata of GGUF files.

Keys: gguf-py's constants, and what llama.cpp's converter writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any, Protocol

from sapwood.base.errors import ModelSourceError


class Metadata(Protocol):
    """A file's metadata: `fields["block_count"]` is the value of <architecture>.block_count."""

    def get(self, name: str, default: Any = None) -> Any: ...

    def plain(self, key: str) -> Any:
        """The value of a key that does not begin with the architecture; None if there is none."""
        ...

    def __getitem__(self, name: str) -> Any:
        """Raises ModelSourceError if there is no such value."""
        ...

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Of a tensor by its whole name; raises ModelSourceError if there is none."""
        ...

    def has(self, tensor: str) -> bool:
        """Whether some layer has that tensor: "attn_q.bias", …"""
        ...

    def layers_with(self, tensor: str) -> list[int]:
        """The layers that have that tensor."""
        ...

    def uniform(self, name: str, default: int | None = None, *, skips: bool = False) -> int:
        """An integer that may be given per layer; ModelSourceError unless all layers agree, but
        with `skips` for those with 0."""
        ...


MoreFields = Callable[[Metadata, Mapping[str, Any]], Mapping[str, Any]]
"""From metadata, and the fields of config.json that all architectures have, to further fields."""


def none(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


def gemma2(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "attn_logit_softcapping": fields.get("attn_logit_softcapping"),
        "final_logit_softcapping": fields.get("final_logit_softcapping"),
        "query_pre_attn_scalar": _query_scalar(config, num_layers_of_27b=46),
        "sliding_window": int(fields["attention.sliding_window"]),
    }


def gemma3(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "final_logit_softcapping": fields.get("final_logit_softcapping"),
        "query_pre_attn_scalar": _query_scalar(config, num_layers_of_27b=62),
        "sliding_window": int(fields["attention.sliding_window"]),
        "rope_local_base_freq": fields.get("rope.freq_base_swa", 10_000.0),
    }


def gemma3n(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    scales = fields.get("activation_sparsity_scale") or [-math.inf] * config["num_hidden_layers"]
    normal = NormalDist()
    return {
        "activation_sparsity_pattern": [
            # The bound that files have, in deviations, to the share that is below.
            0.0 if one == -math.inf else normal.cdf(one)
            for one in scales
        ],
        "altup_active_idx": int(fields["altup.active_idx"]),
        "altup_num_inputs": int(fields["altup.num_inputs"]),
        "final_logit_softcapping": fields.get("final_logit_softcapping", 30.0),
        "hidden_size_per_layer_input": int(fields["embedding_length_per_layer_input"]),
        "laurel_rank": fields.shape("blk.0.laurel_l.weight")[0],
        "num_kv_shared_layers": int(fields["attention.shared_kv_layers"]),
        "rope_local_base_freq": fields.get("rope.freq_base_swa", 10_000.0),
        "vocab_size_per_layer_input": fields.shape("per_layer_token_embd.weight")[0],
        **_kinds(fields["attention.sliding_window_pattern"]),
    }


def _query_scalar(config: Mapping[str, Any], *, num_layers_of_27b: int) -> int:
    """Files do not say it: it is head_dim, but for the model of 27 billion parameters."""
    if config["num_hidden_layers"] == num_layers_of_27b:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config["head_dim"])


def granite(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "attention_multiplier": fields.get("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": fields.get("embedding_scale", 1.0),
        "residual_multiplier": fields.get("residual_scale", 1.0),
        "logits_scaling": fields.get("logit_scale", 1.0),
    }


def minicpm(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    depth = math.sqrt(config["num_hidden_layers"])
    return {
        "scale_emb": fields.get("embedding_scale", 12.0),
        "scale_depth": fields.get("residual_scale", 1.4 / depth) * depth,
        "dim_model_base": round(
            config["hidden_size"] / fields.get("logit_scale", config["hidden_size"] / 256)
        ),
    }


def cohere(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "logit_scale": fields["logit_scale"],
        "use_qk_norm": fields.has("attn_q_norm.weight"),
        "sliding_window": fields.get("attention.sliding_window"),
    }


def stablelm(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    if fields.has("attn_q_norm.weight"):
        raise ModelSourceError(
            "the file has norms of each head in one tensor, which sapwood does not read from GGUF "
            "for stablelm; a safetensors version of the model may be served"
        )
    return {
        "use_parallel_residual": bool(fields.get("use_parallel_residual", False)),
        "use_qkv_bias": fields.has("attn_q.bias"),
    }


def exaone4(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    pattern = fields.get("attention.sliding_window_pattern")
    if not isinstance(pattern, list) or not fields.get("attention.sliding_window"):
        return {}
    return _kinds(pattern)


def use_bias(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"use_bias": fields.has("attn_q.bias")}


def seed_oss(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"attention_out_bias": fields.has("attn_output.bias")}


def olmo(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"clip_qkv": fields.get("attention.clamp_kqv") or None}


def gpt_bigcode(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"multi_query": config["num_key_value_heads"] == 1}


def gpt_neox(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "use_parallel_residual": bool(fields.get("use_parallel_residual", True)),
        "attention_bias": fields.has("attn_qkv.bias"),
    }


def falcon(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    is_new = config["num_key_value_heads"] != 1
    return {
        "new_decoder_architecture": is_new,
        "multi_query": not is_new,
        "num_ln_in_parallel_attn": 2 if fields.has("attn_norm_2.weight") else 1,
    }


def mpt(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    max_bias = fields.get("attention.max_alibi_bias", 0.0)
    said = {"alibi": max_bias > 0.0, "clip_qkv": fields.get("attention.clamp_kqv") or None}
    return {"attn_config": said | ({"alibi_bias_max": max_bias} if max_bias > 0.0 else {})}


_BAICHUAN_13B_LAYERS = 40
"""By this number llama.cpp tells the model with ALiBi from that with rotation; files do not say."""


def baichuan(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    if config["num_hidden_layers"] != _BAICHUAN_13B_LAYERS:
        return {}
    return {
        "model_max_length": config["max_position_embeddings"],
        "max_position_embeddings": None,
    }


def chatglm(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "rope_ratio": config["rope_theta"] / 10_000.0,
        "add_qkv_bias": fields.has("attn_qkv.bias") or fields.has("attn_q.bias"),
    }


def apertus(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, usual in (("beta", 0.5), ("eps", -1e-6)):
        said = fields.plain(f"xielu.{name}")
        if said is not None and any(not math.isclose(one, usual, rel_tol=1e-2) for one in said):
            raise ModelSourceError(
                f"the file has xielu.{name} = {said}, and only {usual} is implemented"
            )
    learned = {name: fields.plain(f"xielu.{name}") for name in ("alpha_p", "alpha_n")}
    number = config["num_hidden_layers"]
    for name, values in learned.items():
        if not isinstance(values, list) or len(values) != number:
            raise ModelSourceError(f"the file must have {number} numbers as xielu.{name}")
    return {f"xielu_{name}": values for name, values in learned.items()}


def lfm2(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    heads = fields["attention.head_count_kv"]
    number = config["num_hidden_layers"]
    per_layer = heads if isinstance(heads, list) else [heads] * number
    return {
        "layer_types": ["full_attention" if one else "conv" for one in per_layer],
        "conv_L_cache": int(fields["shortconv.l_cache"]),
        "block_auto_adjust_ff_dim": False,
    }


def latent_sizes(fields: Metadata) -> Mapping[str, Any]:
    """The sizes of latent attention. In files whose kv_b_proj is cut in two, key_length and
    value_length are those of the cache's rows, and ..._mla those of heads."""
    key_dim, value_dim = (
        int(fields.get(f"attention.{kind}_length_mla") or fields[f"attention.{kind}_length"])
        for kind in ("key", "value")
    )
    rope_dim = int(fields["rope.dimension_count"])
    has_rank = fields.has("attn_q_a.weight")
    return {
        "kv_lora_rank": int(fields["attention.kv_lora_rank"]),
        "q_lora_rank": int(fields["attention.q_lora_rank"]) if has_rank else None,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_dim - rope_dim,
        "v_head_dim": value_dim,
        "partial_rotary_factor": 1.0,
    }


def olmo2(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    pattern = fields.get("attention.sliding_window_pattern")
    if not isinstance(pattern, list) or not fields.get("attention.sliding_window"):
        return {}
    return {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", **_kinds(pattern)}


def _kinds(pattern: list[Any]) -> dict[str, list[str]]:
    """layer_types, of whether each layer has a window."""
    return {"layer_types": ["sliding_attention" if one else "full_attention" for one in pattern]}
