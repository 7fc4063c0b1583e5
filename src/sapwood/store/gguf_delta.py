"""What GGUF files of models with gated delta nets hold, in the words of Hugging Face's. No torch.

Their files have the rates of decay instead of the rates' logs, and Qwen's weights of norms are
larger by 1, but for those of gated norms. Source: llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapwood.base.errors import ModelSourceError
from sapwood.store.gguf_architecture import Architecture
from sapwood.store.gguf_experts import (
    OF_MLP,
    READS,
    SOFTMAX,
    choice,
    expert_names,
    grouped,
    shared_names,
)
from sapwood.store.gguf_fields import Metadata, latent_sizes
from sapwood.store.gguf_states import per_layer, state_names

_KINDS = {True: "linear_attention", False: "full_attention"}
_USUAL_INTERVAL = 4
"""Of layers with attention, in files that do not say it."""


def _qwen3_5(fields: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fused projection that such files have is that of gated delta nets."""
    num_heads, width = int(fields["ssm.time_step_rank"]), int(fields["ssm.inner_size"])
    num_key_heads = int(fields["ssm.group_count"])
    if min(num_heads, num_key_heads) < 1 or width % num_heads or num_heads % num_key_heads:
        raise ModelSourceError(
            f"the file has {width} values of linear attention (ssm.inner_size) for {num_heads} "
            f"heads (ssm.time_step_rank) and {num_key_heads} key heads (ssm.group_count), which is "
            "impossible; convert the model again"
        )
    return {
        "gguf_projections": "separate",
        "layer_types": _kinds(fields, config["num_hidden_layers"]),
        "linear_conv_kernel_dim": int(fields["ssm.conv_kernel"]),
        "linear_key_head_dim": int(fields["ssm.state_size"]),
        "linear_num_key_heads": num_key_heads,
        "linear_num_value_heads": num_heads,
        "linear_value_head_dim": width // num_heads,
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0),
    }


def _kinds(fields: Metadata, num_layers: int) -> list[str]:
    """layer_types, which newer files say layer by layer, and older ones as an interval."""
    said = fields.get("attention.recurrent_layers")
    if isinstance(said, list) and len(said) >= num_layers:
        return [_KINDS[bool(one)] for one in said[:num_layers]]
    interval = int(fields.get("full_attention_interval", _USUAL_INTERVAL))
    if interval < 1:
        raise ModelSourceError(f"the file has full_attention_interval {interval}, not 1 or more")
    return [_KINDS[bool((layer + 1) % interval)] for layer in range(num_layers)]


def _experts(fields: Metadata) -> dict[str, Any]:
    return {
        **choice(fields, function=SOFTMAX, normalises=True),
        "num_experts": int(fields["expert_count"]),
        "moe_intermediate_size": int(fields["expert_feed_forward_length"]),
        "shared_expert_intermediate_size": fields.shape("blk.0.ffn_gate_shexp.weight")[0],
    }


def _qwen3_5_moe(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**_qwen3_5(fields, config), **_experts(fields)}


def _qwen3_next(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Files of 2025 have the first projections as Hugging Face's do, key head by key head."""
    return {
        **_qwen3_5_moe(fields, config),
        "gguf_splits_qkvz": fields.has("attn_gate.weight"),
    }


def _kimi_linear(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Layers without key and value heads keep a state."""
    kv_heads = per_layer(fields, config, "attention.head_count_kv")
    return {
        **grouped(fields, config),
        **latent_sizes(fields),
        "num_key_value_heads": config["num_attention_heads"],
        "layer_types": [_KINDS[not number] for number in kv_heads],
        "linear_num_heads": config["num_attention_heads"],
        "linear_head_dim": int(fields["kda.head_dim"]),
        "linear_conv_kernel_dim": int(fields["ssm.conv_kernel"]),
    }


_QWEN_NAMES = {
    **state_names("linear_attn"),
    "attn_gate": "linear_attn.in_proj_z",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "post_attention_norm": "post_attention_layernorm",
}
_QWEN3_5_NAMES = {
    **_QWEN_NAMES,
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
}
_QWEN_EXPERTS = {
    **OF_MLP,
    **shared_names("mlp.shared_expert"),
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_KIMI_NAMES = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    **{f"ssm_conv1d_{part}": f"self_attn.{part}_conv1d" for part in "qkv"},
    "ssm_a": "self_attn.A_log",
    "ssm_beta": "self_attn.b_proj",
    "ssm_dt.bias": "self_attn.dt_bias",
    "ssm_f_a": "self_attn.f_a_proj",
    "ssm_f_b": "self_attn.f_b_proj",
    "ssm_g_a": "self_attn.g_a_proj",
    "ssm_g_b": "self_attn.g_b_proj",
    "ssm_norm": "self_attn.o_norm",
    "ffn_gate_inp": "block_sparse_moe.gate",
    **expert_names("block_sparse_moe", ("w1", "w3", "w2")),
    **shared_names("block_sparse_moe.shared_experts"),
    "exp_probs_b.bias": "block_sparse_moe.gate.e_score_correction_bias",
}

DENSE: Mapping[str, Architecture] = {
    "qwen35": Architecture(
        class_name="Qwen3_5ForCausalLM",
        model_type="qwen3_5_text",
        adds_one=True,
        tiles_heads=True,
        names=_QWEN3_5_NAMES,
        more=_qwen3_5,
    ),
}
MIXTURES: Mapping[str, Architecture] = {
    "kimi-linear": Architecture(
        class_name="KimiLinearForCausalLM",
        model_type="kimi_linear",
        mixes=True,
        names=_KIMI_NAMES,
        reads=("attention.value_length", *READS),
        more=_kimi_linear,
    ),
    "qwen35moe": Architecture(
        class_name="Qwen3_5MoeForCausalLM",
        model_type="qwen3_5_moe_text",
        adds_one=True,
        tiles_heads=True,
        names={**_QWEN3_5_NAMES, **_QWEN_EXPERTS},
        reads=READS,
        more=_qwen3_5_moe,
    ),
    "qwen3next": Architecture(
        class_name="Qwen3NextForCausalLM",
        model_type="qwen3_next",
        adds_one=True,
        names={
            **_QWEN_NAMES,
            **_QWEN_EXPERTS,
            "ssm_in": "linear_attn.in_proj_qkvz",
            "ssm_ba": "linear_attn.in_proj_ba",
        },
        reads=READS,
        more=_qwen3_next,
    ),
}
"""Those whose files have experts."""
