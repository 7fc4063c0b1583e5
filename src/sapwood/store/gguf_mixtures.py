"""What GGUF files of mixtures of experts hold, in the words of Hugging Face's. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapwood.base.errors import ModelSourceError
from sapwood.store.gguf_architecture import Architecture
from sapwood.store.gguf_architectures import ARCHITECTURES
from sapwood.store.gguf_delta import MIXTURES as DELTA
from sapwood.store.gguf_experts import (
    EXPERT_LAYERS,
    GROUPED_NAMES,
    NO_FUNCTION,
    OF_MIXTRAL,
    OF_MLP,
    READS,
    SIGMOID,
    SOFTMAX,
    choice,
    expert_names,
    grouped,
    shared_names,
)
from sapwood.store.gguf_fields import Metadata, granite, latent_sizes, lfm2
from sapwood.store.gguf_states import (
    FACTORS,
    GRANITE_NAMES,
    NEMOTRON_NAMES,
    feed_forward_names,
    granite_hybrid,
    nemotron_h,
    per_layer,
    selective_names,
)


def _mixtral(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        **choice(fields, function=SOFTMAX, normalises=True),
        "num_local_experts": int(fields["expert_count"]),
    }


def _qwen2_moe(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        **choice(fields, function=SOFTMAX, normalises=False),
        "num_experts": int(fields["expert_count"]),
        "moe_intermediate_size": int(fields["expert_feed_forward_length"]),
        "shared_expert_intermediate_size": int(fields["expert_shared_feed_forward_length"]),
    }


def _qwen3_moe(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        **choice(fields, function=SOFTMAX, normalises=True),
        "num_experts": int(fields["expert_count"]),
        "moe_intermediate_size": int(fields["expert_feed_forward_length"]),
    }


def _olmoe(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        **choice(fields, function=SOFTMAX, normalises=False),
        "num_experts": int(fields["expert_count"]),
        "clip_qkv": fields.get("attention.clamp_kqv") or None,
    }


def _granite_moe(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    if fields.get("expert_shared_feed_forward_length", 0):
        raise ModelSourceError(
            "the file has experts that every token has, which sapwood does not read from GGUF for "
            "granitemoe; a safetensors version of the model may be served"
        )
    return {**granite(fields, config), **_mixtral(fields, config)}


def _gpt_oss(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """llama.cpp rounds the bounds between rotations that are stretched and that are not, which the
    model's own code does not."""
    found: dict[str, Any] = {
        "num_experts_per_tok": int(fields["expert_used_count"]),
        "num_local_experts": int(fields["expert_count"]),
        "intermediate_size": int(fields["expert_feed_forward_length"]),
    }
    if "rope_scaling" in config:
        found["rope_scaling"] = {**config["rope_scaling"], "truncate": False}
    return found


def _phimoe(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "num_experts_per_tok": int(fields["expert_used_count"]),
        "num_local_experts": int(fields["expert_count"]),
        "lm_head_bias": True,
    }


def _minimax_m2(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        **choice(fields, function=SIGMOID, normalises=True),
        "num_local_experts": int(fields["expert_count"]),
        "intermediate_size": int(fields["expert_feed_forward_length"]),
    }


def _hunyuan_moe(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    chosen = choice(fields, function=SOFTMAX, normalises=True)["num_experts_per_tok"]
    return {
        "num_experts": int(fields["expert_count"]),
        "moe_topk": chosen,
        "moe_intermediate_size": int(fields["expert_feed_forward_length"]),
        "num_shared_expert": int(fields.get("expert_shared_count", 1)),
    }


def _ernie4_5_moe(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        **choice(fields, function=SOFTMAX, normalises=True),
        "num_experts": int(fields["expert_count"]),
        "moe_intermediate_size": int(fields["expert_feed_forward_length"]),
        "moe_num_shared_experts": int(fields.get("expert_shared_count", 0)),
        "moe_layer_start_index": int(fields.get("leading_dense_block_count", 0)),
        "moe_layer_interval": int(fields.get("interleave_moe_layer_step", 1)),
        "use_bias": fields.has("attn_q.bias"),
    }


def _bailing_moe2(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = grouped(fields, config)
    size = found["moe_intermediate_size"]
    return {
        **found,
        "num_experts": found["n_routed_experts"],
        "num_shared_experts": found["n_shared_experts"],
        "moe_shared_expert_intermediate_size": int(
            fields.get("expert_shared_feed_forward_length", size)
        ),
        "use_qkv_bias": fields.has("attn_qkv.bias"),
    }


def _lfm2_moe(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        **lfm2(fields, config),
        **choice(fields, function=SIGMOID, normalises=True),
        "num_experts": int(fields["expert_count"]),
        "moe_intermediate_size": int(fields["expert_feed_forward_length"]),
        "num_dense_layers": int(fields.get("leading_dense_block_count", 0)),
        "use_expert_bias": True,
    }


def _granite_hybrid(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        **granite_hybrid(fields, config),
        **_mixtral(fields, config),
        "shared_intermediate_size": int(fields.get("expert_shared_feed_forward_length", 0)),
    }


def _nemotron_h(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = dict(nemotron_h(fields, config))
    kinds = ["moe" if kind == "mlp" else kind for kind in found["layers_block_type"]]
    return {
        **found,
        "layers_block_type": kinds,
        "n_routed_experts": int(fields["expert_count"]),
        "num_experts_per_tok": fields.uniform("expert_used_count", skips=True),
        "moe_intermediate_size": fields.uniform("expert_feed_forward_length", skips=True),
        "moe_shared_expert_intermediate_size": int(
            fields.get("expert_shared_feed_forward_length", 0)
        ),
        "moe_latent_size": fields.get("moe_latent_size"),
        "norm_topk_prob": bool(fields.get("expert_weights_norm", True)),
        "routed_scaling_factor": float(fields.get("expert_weights_scale", 1.0)),
        "n_group": int(fields.get("expert_group_count", 1)),
        "topk_group": int(fields.get("expert_group_used_count", 1)),
    }


def _jamba(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    number = config["num_hidden_layers"]
    heads = per_layer(fields, config, "attention.head_count_kv")
    return {
        **choice(fields, function=SOFTMAX, normalises=False),
        **_period("attn_layer", [layer for layer, one in enumerate(heads) if one], number),
        **_period("expert_layer", fields.layers_with("ffn_gate_inp.weight"), number),
        "num_experts": int(fields["expert_count"]),
        "mamba_d_state": int(fields["ssm.state_size"]),
        "mamba_d_conv": int(fields["ssm.conv_kernel"]),
        "mamba_dt_rank": int(fields["ssm.time_step_rank"]),
        "mamba_expand": int(fields["ssm.inner_size"]) // config["hidden_size"],
        "mamba_proj_bias": fields.has("ssm_in.bias"),
        "mamba_conv_bias": fields.has("ssm_conv1d.bias"),
    }


def _period(name: str, layers: list[int], number: int) -> dict[str, int]:
    """The period and the offset of layers that come once in each; ModelSourceError for others."""
    offset = layers[0] if layers else number
    period = layers[1] - offset if len(layers) > 1 else number + 1
    if layers != [layer for layer in range(number) if layer % period == offset]:
        raise ModelSourceError(
            f"the file has layers of one kind ({name}) at {layers}, which do not come once "
            "in a period; sapwood does not serve that"
        )
    return {f"{name}_period": period, f"{name}_offset": offset}


def _deepseek2(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """DeepSeek V2 and V3, and what is built alike."""
    by_sigmoid = fields.get("expert_gating_func", NO_FUNCTION) == SIGMOID or (
        not fields.get("expert_gating_func") and fields.has("exp_probs_b.bias")
    )
    if not by_sigmoid and fields.has("exp_probs_b.bias"):
        raise ModelSourceError(
            "the file has a bias for the choice of experts by a softmax, which sapwood does not "
            "serve for this architecture; a safetensors version of the model may be served"
        )
    num_groups = int(fields.get("expert_group_count", 1))
    v2 = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy" if num_groups > 1 else "greedy",
    }
    found = {
        **({} if by_sigmoid else v2),
        **choice(fields, function=SIGMOID if by_sigmoid else SOFTMAX, normalises=False),
        "n_routed_experts": int(fields["expert_count"]),
        "n_shared_experts": int(fields["expert_shared_count"]),
        "moe_intermediate_size": fields.uniform("expert_feed_forward_length", skips=True),
        "first_k_dense_replace": int(fields.get("leading_dense_block_count", 0)),
        "routed_scaling_factor": float(fields.get("expert_weights_scale", 1.0)),
        "n_group": num_groups,
        "topk_group": int(fields.get("expert_group_used_count", 1)),
        **latent_sizes(fields),
    }
    tenth = fields.get("rope.scaling.yarn_log_multiplier")
    if tenth and "rope_scaling" in config:
        # Ten times what the file says; llama.cpp takes both to be equal.
        magnitudes = {"mscale": 10 * tenth, "mscale_all_dim": 10 * tenth}
        found["rope_scaling"] = {**config["rope_scaling"], **magnitudes}
    return found


MIXTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        class_name="MixtralForCausalLM",
        model_type="mixtral",
        permuted=True,
        names=OF_MIXTRAL,
        reads=READS,
        more=_mixtral,
    ),
    "bailingmoe2": Architecture(
        class_name="BailingMoeV2ForCausalLM",
        model_type="bailing_moe",
        names={
            **OF_MLP,
            **shared_names("mlp.shared_experts"),
            "token_embd": "model.word_embeddings",
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "attn_q_norm": "attention.query_layernorm",
            "attn_k_norm": "attention.key_layernorm",
            "exp_probs_b.bias": "mlp.gate.expert_bias",
        },
        reads=READS,
        more=_bailing_moe2,
    ),
    "deepseek2": Architecture(
        class_name="DeepseekV3ForCausalLM",
        model_type="deepseek_v3",
        known_as=("DeepseekV2ForCausalLM",),
        names={
            **GROUPED_NAMES,
            "attn_q_a": "self_attn.q_a_proj",
            "attn_q_b": "self_attn.q_b_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            "attn_kv_b": "self_attn.kv_b_proj",
        },
        reads=("attention.value_length", "rope.scaling.yarn_log_multiplier", *READS),
        more=_deepseek2,
    ),
    "dots1": Architecture(
        class_name="Dots1ForCausalLM",
        model_type="dots1",
        names=GROUPED_NAMES,
        reads=READS,
        more=grouped,
    ),
    "ernie4_5-moe": Architecture(
        class_name="Ernie4_5_MoeForCausalLM",
        model_type="ernie4_5_moe",
        names={
            **OF_MLP,
            **shared_names("mlp.shared_experts"),
            "exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias",
        },
        reads=READS,
        more=_ernie4_5_moe,
    ),
    "glm4moe": Architecture(
        class_name="Glm4MoeForCausalLM",
        model_type="glm4_moe",
        names={**GROUPED_NAMES, "post_attention_norm": "post_attention_layernorm"},
        reads=READS,
        more=grouped,
    ),
    "gpt-oss": Architecture(
        class_name="GptOssForCausalLM",
        model_type="gpt_oss",
        has_windows=True,
        names={
            **OF_MLP,
            "ffn_gate_inp": "mlp.router",
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks.weight": "self_attn.sinks",
        },
        reads=READS,
        more=_gpt_oss,
    ),
    "granitemoe": Architecture(
        class_name="GraniteMoeForCausalLM",
        model_type="granitemoe",
        permuted=True,
        names={
            "ffn_gate_inp": "block_sparse_moe.router.layer",
            **expert_names("block_sparse_moe", EXPERT_LAYERS),
        },
        reads=(*FACTORS, *READS),
        more=_granite_moe,
    ),
    "granitehybrid": Architecture(
        class_name="GraniteMoeHybridForCausalLM",
        model_type="granitemoehybrid",
        permuted=True,
        mixes=True,
        names={
            **GRANITE_NAMES,
            "ffn_gate_inp": "block_sparse_moe.router.layer",
            **expert_names("block_sparse_moe", EXPERT_LAYERS),
            "ffn_gate_shexp": "shared_mlp.gate",
            "ffn_up_shexp": "shared_mlp.up",
            "ffn_down_shexp": "shared_mlp.output_linear",
        },
        reads=(*FACTORS, *READS),
        more=_granite_hybrid,
    ),
    "hunyuan-moe": Architecture(
        class_name="HunYuanMoEV1ForCausalLM",
        model_type="hunyuan_v1_moe",
        names={
            **OF_MLP,
            **shared_names("mlp.shared_mlp"),
            **ARCHITECTURES["hunyuan-dense"].names,
            "ffn_gate_inp": "mlp.gate.wg",
        },
        reads=READS,
        more=_hunyuan_moe,
    ),
    "jamba": Architecture(
        class_name="JambaForCausalLM",
        model_type="jamba",
        mixes=True,
        names={
            **selective_names("mamba"),
            **feed_forward_names("feed_forward"),
            "ffn_norm": "pre_ff_layernorm",
            "output_norm": "model.final_layernorm",
            "ffn_gate_inp": "feed_forward.router",
            **expert_names("feed_forward", EXPERT_LAYERS),
        },
        reads=READS,
        more=_jamba,
    ),
    "lfm2moe": Architecture(
        class_name="Lfm2MoeForCausalLM",
        model_type="lfm2_moe",
        mixes=True,
        names={
            **ARCHITECTURES["lfm2"].names,
            "ffn_gate_inp": "feed_forward.gate",
            **expert_names("feed_forward", ("w1", "w3", "w2")),
            "exp_probs_b.bias": "feed_forward.expert_bias",
        },
        reads=READS,
        more=_lfm2_moe,
    ),
    "minimax-m2": Architecture(
        class_name="MiniMaxM2ForCausalLM",
        model_type="minimax_m2",
        names={
            **OF_MIXTRAL,
            "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
        },
        reads=READS,
        more=_minimax_m2,
    ),
    "nemotron_h_moe": Architecture(
        class_name="NemotronHForCausalLM",
        model_type="nemotron_h",
        norm="rms or layer",
        activation="relu2",
        mixes=True,
        names={
            **NEMOTRON_NAMES,
            "ffn_gate_inp": "mixer.gate",
            **expert_names("mixer", EXPERT_LAYERS),
            **shared_names("mixer.shared_experts"),
            "ffn_latent_down": "mixer.fc1_latent_proj",
            "ffn_latent_up": "mixer.fc2_latent_proj",
            "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
        },
        reads=READS,
        more=_nemotron_h,
    ),
    "olmoe": Architecture(
        class_name="OlmoeForCausalLM",
        model_type="olmoe",
        names=OF_MLP,
        reads=READS,
        more=_olmoe,
    ),
    "phimoe": Architecture(
        class_name="PhimoeForCausalLM",
        model_type="phimoe",
        has_windows=True,
        names=OF_MIXTRAL,
        reads=READS,
        more=_phimoe,
    ),
    "qwen2moe": Architecture(
        class_name="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        names={
            **OF_MLP,
            **shared_names("mlp.shared_expert"),
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        },
        reads=READS,
        more=_qwen2_moe,
    ),
    "qwen3moe": Architecture(
        class_name="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        names=OF_MLP,
        reads=READS,
        more=_qwen3_moe,
    ),
    **DELTA,
}
"""The architectures of files that have experts."""


def architecture_named(name: str, *, has_experts: bool) -> Architecture | None:
    """None: sapwood reads no such files."""
    return (MIXTURES if has_experts else ARCHITECTURES).get(name)
