"""Small configurations of all architectures that transformers has."""

from __future__ import annotations

from functools import cache
from typing import Any

from tests.models.lm.peer import Peer, make_peer

WINDOW = 24
"""Shorter than the texts, and no multiple of a page."""


def longrope(num_pairs: int, original_length: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": original_length,
        "short_factor": [1.0 + index / 20 for index in range(num_pairs)],
        "long_factor": [1.5 + index / 4 for index in range(num_pairs)],
    }


PHIMOE_LONG = longrope(16, 8) | {"short_mscale": 1.2, "long_mscale": 1.3}
PHIMOE_LONG["long_factor"] = PHIMOE_LONG["short_factor"]
DBRX_ROPE = {"rope_type": "default", "rope_theta": 5e5}
LLAMA4 = {"intermediate_size_mlp": 96, "attention_chunk_size": 16, "floor_scale": 8}
LLAMA4 |= {"attn_scale": 0.5, "pad_token_id": None}
FALCON = {"hidden_size": 192, "ffn_hidden_size": 80, "head_dim": None}

WINDOWS_AND_ALL = ["sliding_attention", "full_attention"]
GEMMA3N = {
    "sliding_window": WINDOW,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 120,
    "laurel_rank": 8,
    "pad_token_id": 0,
}
GEMMA4 = {
    "sliding_window": WINDOW,
    "global_head_dim": 64,
    "vocab_size_per_layer_input": 131,
    "pad_token_id": 0,
}
# The loop's field would be the size of keys elsewhere; here transformers makes it rope_dim's.
LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 16, "v_head_dim": 24}
LATENT |= {"q_lora_rank": 40, "head_dim": None, "num_key_value_heads": 6, "pad_token_id": None}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32, "beta_slow": 1}
YARN |= {"original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.9}
GROUPS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
GROUPS |= {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "n_shared_experts": 2}
# With fewer heads, several keys would often have the score 0, and any of them could be chosen.
SPARSE = LATENT | GROUPS | {"index_n_heads": 12, "index_head_dim": 64, "first_k_dense_replace": 1}

HYBRIDS = ["linear_attention", "hybrid", "hybrid", "hybrid"]
ZAMBA = {"hidden_size": 96, "head_dim": None, "num_key_value_heads": 6, "adapter_rank": 8}
ZAMBA |= {"n_mamba_heads": 6, "mamba_d_state": 8, "chunk_size": 16}
BAILING = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
BAILING |= {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "num_key_value_heads": 6}
BAILING |= {"kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 12, "v_head_dim": 20}
BAILING |= {"head_dim": 16, "pad_token_id": None}

DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
QWEN_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral, window": ("mistral", "MistralForCausalLM", {"sliding_window": WINDOW}),
    "qwen2, window in one layer": (
        "qwen2",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "mixtral": ("mixtral", "MixtralForCausalLM", {"num_local_experts": 4}),
    "mixtral, window": (
        "mixtral",
        "MixtralForCausalLM",
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": WINDOW},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"shared_expert_intermediate_size": 56, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"norm_topk_prob": True},
    ),
    "olmoe": (
        "olmoe",
        "OlmoeForCausalLM",
        {"num_experts": 5, "num_experts_per_tok": 2, "hidden_size": 192},
    ),
    "flex_olmo": (
        "flex_olmo",
        "FlexOlmoForCausalLM",
        {"num_experts": 5, "num_experts_per_tok": 2, "pad_token_id": None},
    ),
    "granitemoe": (
        "granitemoe",
        "GraniteMoeForCausalLM",
        {"num_local_experts": 5, "residual_multiplier": 0.4, "attention_multiplier": 0.2},
    ),
    "granitemoeshared": (
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        {"num_local_experts": 5, "residual_multiplier": 0.4, "shared_intermediate_size": 40},
    ),
    "granitemoe_swa": (
        "granitemoe_swa",
        "GraniteMoeSWAForCausalLM",
        {"num_local_experts": 5, "sliding_window": WINDOW, "attention_multiplier": 0.2}
        | {"num_hidden_layers": 3, "layer_rope_theta": [1e4, 0, 5e3]},
    ),
    "granite_swa": (
        "granite_swa",
        "GraniteSWAForCausalLM",
        {"sliding_window": WINDOW, "attention_multiplier": 0.2, "attention_bias": True},
    ),
    "mellum": (
        "mellum",
        "MellumForCausalLM",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"sliding_window": WINDOW, "layer_types": [*WINDOWS_AND_ALL, "full_attention"]}
        | {"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]},
    ),
    "hy_v3": (
        "hy_v3",
        "HYV3ForCausalLM",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"num_shared_experts": 2, "head_dim": 32, "num_hidden_layers": 3},
    ),
    "hyperclovax": (
        "hyperclovax",
        "HyperCLOVAXForCausalLM",
        {"residual_multiplier": 0.4, "logits_scaling": 0.7, "embedding_multiplier": 3.0},
    ),
    "hyperclovax, norms before alone": (
        "hyperclovax",
        "HyperCLOVAXForCausalLM",
        {"use_post_norm": False, "attention_multiplier": 0.3, "attention_bias": True},
    ),
    "cohere2_moe": (
        "cohere2_moe",
        "Cohere2MoeForCausalLM",
        {"num_experts": 5, "num_experts_per_tok": 2, "num_shared_experts": 2, "head_dim": 32}
        | {"sliding_window": WINDOW, "first_k_dense_replace": 1, "num_hidden_layers": 3}
        | {"prefix_dense_intermediate_size": 56, "sliding_window_pattern": 2},
    ),
    "cohere2_moe, logistic": (
        "cohere2_moe",
        "Cohere2MoeForCausalLM",
        {"num_experts": 5, "num_experts_per_tok": 2, "num_shared_experts": 1, "head_dim": 32}
        | {"expert_selection_fn": "sigmoid", "shared_expert_combination_strategy": "sum"}
        | {"rms_norm_eps": 1e-5, "sliding_window": WINDOW, "norm_topk_prob": False},
    ),
    "jais2": ("jais2", "Jais2ForCausalLM", {}),
    "vaultgemma": (
        "vaultgemma",
        "VaultGemmaForCausalLM",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
    ),
    "glm4_moe": (
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "use_qk_norm": True}
        | {"n_shared_experts": 2, "attention_bias": True},
    ),
    "dots1": (
        "dots1",
        "Dots1ForCausalLM",
        {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "gpt_oss": (
        "gpt_oss",
        "GptOssForCausalLM",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "phimoe": (
        "phimoe",
        "PhimoeForCausalLM",
        {"num_local_experts": 5, "router_jitter_noise": 0.2, "hidden_size": 192}
        | {"lm_head_bias": True, "attention_bias": True}
        | {"rope_parameters": longrope(16, 256) | {"short_mscale": 1.2, "long_mscale": 1.3}},
    ),
    "phimoe, long": (
        "phimoe",
        "PhiMoEForCausalLM",
        # transformers takes the short factors for all texts, but not so the model's own code.
        {"num_local_experts": 5, "router_jitter_noise": 0.2, "hidden_size": 192}
        | {"sliding_window": WINDOW, "rope_parameters": PHIMOE_LONG},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        {"moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 40, "use_bias": True}
        | {"moe_num_shared_experts": 2, "num_hidden_layers": 3, "moe_layer_end_index": 1},
    ),
    "ernie4_5_moe, every second layer": (
        "ernie4_5_moe",
        "Ernie4_5_MoEForCausalLM",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 40, "moe_norm_min": 0.9}
        | {"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_interval": 2},
    ),
    "minimax_m2": (
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        {"num_local_experts": 6, "num_experts_per_tok": 3, "rotary_dim": 16},
    ),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        {"num_experts": 6, "moe_topk": [3, 3], "attention_bias": True},
    ),
    "exaone_moe": (
        "exaone_moe",
        "ExaoneMoeForCausalLM",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"num_shared_experts": 2, "num_hidden_layers": 4, "sliding_window": WINDOW}
        | {"n_group": 4, "topk_group": 2},
    ),
    "solar_open": (
        "solar_open",
        "SolarOpenForCausalLM",
        {"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"attention_bias": True, "routed_scaling_factor": 1.5, "intermediate_size": None}
        | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "afmoe": (
        "afmoe",
        "AfmoeForCausalLM",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"num_hidden_layers": 4, "sliding_window": WINDOW, "mup_enabled": True}
        | {"route_scale": 1.5},
    ),
    "dbrx": (
        "dbrx",
        "DbrxForCausalLM",
        {"hidden_size": 192, "d_model": 192, "head_dim": None, "rope_parameters": DBRX_ROPE}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 1.2, "rope_theta": 5e5}}
        | {"ffn_config": {"ffn_hidden_size": 80, "moe_num_experts": 6, "moe_top_k": 3}},
    ),
    "llama4": (
        "llama4_text",
        "Llama4ForCausalLM",
        LLAMA4 | {"num_hidden_layers": 4, "num_local_experts": 5, "num_experts_per_tok": 1},
    ),
    "llama4, dense layers": (
        "llama4_text",
        "Llama4ForCausalLM",
        LLAMA4
        | {"num_hidden_layers": 3, "num_local_experts": 5, "num_experts_per_tok": 2}
        | {"interleave_moe_layer_step": 2, "no_rope_layers": [1, 0, 1], "use_qk_norm": False}
        | {"attention_bias": True, "attn_temperature_tuning": False},
    ),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        {"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {
            "num_hidden_layers": 3,
            "sliding_window": WINDOW,
            "v_head_dim": 24,
            "num_key_value_heads": 1,
        }
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "lfm2_moe": (
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"num_hidden_layers": 4, "num_dense_layers": 1, "conv_bias": True}
        | {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    ),
    "lfm2_moe, no correction": (
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"num_dense_layers": 0, "use_expert_bias": False, "norm_topk_prob": False}
        | {"layer_types": ["full_attention", "conv"], "tie_word_embeddings": False},
    ),
    "lfm2": (
        "lfm2",
        "Lfm2ForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "conv"],
            "block_multiple_of": 16,
        },
    ),
    "lfm2, biases": (
        "lfm2",
        "Lfm2ForCausalLM",
        {
            "num_hidden_layers": 3,
            "full_attn_idxs": [0, 2],
            "conv_bias": True,
            "conv_L_cache": 5,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
    ),
    "lfm2, no attention": (
        "lfm2",
        "Lfm2ForCausalLM",
        {"full_attn_idxs": [], "conv_L_cache": 2, "block_multiple_of": 16},
    ),
    "mamba2": (
        "mamba2",
        "Mamba2ForCausalLM",
        {"num_heads": 6, "head_dim": 16, "n_groups": 2, "state_size": 12, "chunk_size": 16}
        | {"use_bias": True},
    ),
    "mamba": ("mamba", "MambaForCausalLM", {"state_size": 6, "time_step_rank": 6}),
    "falcon_mamba": (
        "falcon_mamba",
        "FalconMambaForCausalLM",
        {"state_size": 6, "use_bias": True, "time_step_rank": 4},
    ),
    "jamba": (
        "jamba",
        "JambaForCausalLM",
        {"num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 1}
        | {"num_experts": 4, "mamba_d_state": 6, "mamba_dt_rank": 8, "mamba_d_conv": 3},
    ),
    "minimax": (
        "minimax",
        "MiniMaxForCausalLM",
        {"num_hidden_layers": 3, "block_size": 16, "num_local_experts": 4}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        | {"full_attn_alpha_factor": 1.2, "full_attn_beta_factor": 0.8, "mlp_alpha_factor": 0.9}
        | {"linear_attn_alpha_factor": 1.1, "linear_attn_beta_factor": 0.7, "mlp_beta_factor": 1.3},
    ),
    "bamba": (
        "bamba",
        "BambaForCausalLM",
        {"mamba_n_heads": 6, "mamba_d_state": 8, "mamba_n_groups": 3, "mamba_chunk_size": 16}
        | {"num_hidden_layers": 3, "attn_layer_indices": [1], "hidden_size": 192},
    ),
    "zamba2": (
        "zamba2",
        "Zamba2ForCausalLM",
        ZAMBA
        | {"num_hidden_layers": 4, "layers_block_type": HYBRIDS, "num_mem_blocks": 2}
        | {"use_shared_attention_adapter": True, "use_mem_rope": True},
    ),
    "zamba2, one block": (
        "zamba2",
        "Zamba2ForCausalLM",
        ZAMBA
        | {"num_hidden_layers": 3, "layers_block_type": HYBRIDS[:3], "add_bias_linear": True}
        | {"num_key_value_heads": 3, "mamba_ngroups": 3},
    ),
    "falcon_h1": (
        "falcon_h1",
        "FalconH1ForCausalLM",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 16}
        | {"hidden_size": 192, "key_multiplier": 0.7, "attention_in_multiplier": 0.9}
        | {"attention_out_multiplier": 1.2, "ssm_multipliers": [0.8, 1.1, 0.9, 1.2, 0.7]}
        | {"ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.6, "mlp_multipliers": [0.8, 1.2]}
        | {"embedding_multiplier": 2.0, "lm_head_multiplier": 0.5},
    ),
    "falcon_h1, norms": (
        "falcon_h1",
        "FalconH1ForCausalLM",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 16}
        | {"hidden_size": 192, "mamba_rms_norm": True, "mamba_n_groups": 2}
        | {"mamba_proj_bias": True, "projectors_bias": True, "mamba_conv_bias": False},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {"num_local_experts": 5, "residual_multiplier": 0.4, "attention_multiplier": 0.2}
        | {"mamba_n_heads": 6, "mamba_d_state": 8, "mamba_chunk_size": 16}
        | {"shared_intermediate_size": 40, "num_hidden_layers": 3}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "granitemoehybrid, no experts": (
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {"num_local_experts": 0, "position_embedding_type": "rope", "mamba_n_heads": 6}
        | {"mamba_d_state": 8, "shared_intermediate_size": 40, "mamba_chunk_size": 16}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "nemotron_h": (
        "nemotron_h",
        "NemotronHForCausalLM",
        {"mamba_num_heads": 6, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8}
        | {"chunk_size": 16, "head_dim": 32, "num_hidden_layers": None}
        | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"]},
    ),
    "nemotron_h, experts": (
        "nemotron_h",
        "NemotronHForCausalLM",
        {"mamba_num_heads": 6, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8}
        | {"chunk_size": 16, "head_dim": 32, "num_hidden_layers": None, "moe_latent_size": 24}
        | {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"moe_shared_expert_intermediate_size": 56, "routed_scaling_factor": 1.5}
        | {"layers_block_type": ["moe", "linear_attention", "full_attention", "moe"]},
    ),
    "qwen3_next": (
        "qwen3_next",
        "Qwen3NextForCausalLM",
        DELTA
        | QWEN_EXPERTS
        | {"full_attention_interval": 2, "layer_types": None}
        | {"mlp_only_layers": [1], "rms_norm_eps": 1e-5},
    ),
    "qwen3_5": ("qwen3_5_text", "Qwen3_5ForCausalLM", DELTA | {"linear_conv_kernel_dim": 3}),
    "qwen3_5_moe": ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", DELTA | QWEN_EXPERTS),
    "kimi_linear": (
        "kimi_linear",
        "KimiLinearForCausalLM",
        {"linear_num_heads": 3, "linear_head_dim": 16, "num_local_experts": 6}
        | {"num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 40}
        | {"kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 12, "v_head_dim": 20}
        | {"num_key_value_heads": 6, "layer_types": ["linear_attention", "full_attention"]}
        | {"pad_token_id": None},
    ),
    "bailing_hybrid": (
        "bailing_hybrid",
        "BailingHybridForCausalLM",
        BAILING | {"num_hidden_layers": 3, "layer_group_size": 2, "first_k_dense_replace": 1},
    ),
    "bailing_hybrid, decays without a bound": (
        "bailing_hybrid",
        "BailingHybridForCausalLM",
        BAILING | {"layer_group_size": 2, "kda_safe_gate": False, "first_k_dense_replace": 0},
    ),
    "olmo_hybrid": (
        "olmo_hybrid",
        "OlmoHybridForCausalLM",
        {"num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 12, "pad_token_id": None}
        | {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "gemma": ("gemma", "GemmaForCausalLM", {}),
    "gemma2": (
        "gemma2",
        "Gemma2ForCausalLM",
        {
            "num_hidden_layers": 3,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
    ),
    "gemma2, no caps": (
        "gemma2",
        "Gemma2ForCausalLM",
        {
            "sliding_window": WINDOW,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "granite": (
        "granite",
        "GraniteForCausalLM",
        {
            "attention_bias": True,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
        },
    ),
    "phi3, short": (
        "phi3",
        "Phi3ForCausalLM",
        {"hidden_size": 192, "rope_parameters": longrope(16, 256), "pad_token_id": None},
    ),
    "phi3, long": (
        "phi3",
        "Phi3ForCausalLM",
        {
            "hidden_size": 192,
            "rope_parameters": {**longrope(12, 8), "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 8,
            "sliding_window": WINDOW,
            "pad_token_id": None,
        },
    ),
    "phi": ("phi", "PhiForCausalLM", {"hidden_size": 192}),
    "phi, tied": ("phi", "PhiForCausalLM", {"hidden_size": 192, "tie_word_embeddings": True}),
    "phi, norms of heads": ("phi", "PhiForCausalLM", {"hidden_size": 192, "qk_layernorm": True}),
    "gemma3": (
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3n": (
        "gemma3n_text",
        "Gemma3nForCausalLM",
        {
            **GEMMA3N,
            "num_hidden_layers": 5,
            "layer_types": [*WINDOWS_AND_ALL, "sliding_attention", *WINDOWS_AND_ALL],
            "num_kv_shared_layers": 3,
            "activation_sparsity_pattern": [0.8, 0.0, 0.5, 0.0, 0.95],
            "intermediate_size": [80, 80, 96, 64, 80],
            "final_logit_softcapping": 1.5,
        },
    ),
    "gemma3n, one stream of two": (
        "gemma3n_text",
        "Gemma3nForCausalLM",
        {
            **GEMMA3N,
            "layer_types": WINDOWS_AND_ALL,
            "num_kv_shared_layers": 0,
            "altup_num_inputs": 2,
            "altup_active_idx": 1,
            "altup_correct_scale": False,
        },
    ),
    "gemma4": (
        "gemma4_text",
        "Gemma4ForCausalLM",
        {
            **GEMMA4,
            "hidden_size_per_layer_input": 16,
            "num_hidden_layers": 4,
            "layer_types": 2 * WINDOWS_AND_ALL,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 1.5,
        },
    ),
    "gemma4, values are keys": (
        "gemma4_text",
        "Gemma4ForCausalLM",
        {
            **GEMMA4,
            "hidden_size_per_layer_input": 0,
            "num_hidden_layers": 3,
            "layer_types": [*WINDOWS_AND_ALL, "full_attention"],
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", {}),
    "smollm3": (
        "smollm3",
        "SmolLM3ForCausalLM",
        {"no_rope_layer_interval": 2, "pad_token_id": None},
    ),
    "smollm3, window": (
        "smollm3",
        "SmolLM3ForCausalLM",
        {
            "no_rope_layers": [0, 1],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "attention_bias": True,
            "pad_token_id": None,
        },
    ),
    "stablelm": ("stablelm", "StableLmForCausalLM", {"hidden_size": 192, "use_qkv_bias": True}),
    "apertus": ("apertus", "ApertusForCausalLM", {}),
    "arcee": ("arcee", "ArceeForCausalLM", {"mlp_bias": True}),
    "bloom": ("bloom", "BloomForCausalLM", {"hidden_size": 192}),
    "cohere": ("cohere", "CohereForCausalLM", {"hidden_size": 192, "logit_scale": 0.25}),
    "cohere, norms of heads": (
        "cohere",
        "CohereForCausalLM",
        {"hidden_size": 192, "logit_scale": 1.0, "use_qk_norm": True, "attention_bias": True},
    ),
    "cohere2": (
        "cohere2",
        "Cohere2ForCausalLM",
        {
            "hidden_size": 192,
            "logit_scale": 1.0,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
        },
    ),
    "cwm": (
        "cwm",
        "CwmForCausalLM",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "ernie4_5": ("ernie4_5", "Ernie4_5ForCausalLM", {"use_bias": True}),
    "exaone4": (
        "exaone4",
        "Exaone4ForCausalLM",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "exaone4, window": (
        "exaone4",
        "Exaone4ForCausalLM",
        {"num_hidden_layers": 4, "sliding_window": WINDOW},
    ),
    "falcon": ("falcon", "FalconForCausalLM", FALCON),
    "falcon, two norms": (
        "falcon",
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon, one norm": (
        "falcon",
        "FalconForCausalLM",
        {
            **FALCON,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
        },
    ),
    "falcon, alibi": (
        "falcon",
        "FalconForCausalLM",
        {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "glm": ("glm", "GlmForCausalLM", {"pad_token_id": None}),
    "glm4": ("glm4", "Glm4ForCausalLM", {"pad_token_id": None}),
    "gpt2": ("gpt2", "GPT2LMHeadModel", {"hidden_size": 192}),
    "gpt2, scales by layer": (
        "gpt2",
        "GPT2LMHeadModel",
        {"hidden_size": 192, "n_inner": 80, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt_bigcode": ("gpt_bigcode", "GPTBigCodeForCausalLM", {"hidden_size": 192}),
    "gpt_bigcode, all heads": (
        "gpt_bigcode",
        "GPTBigCodeForCausalLM",
        {"hidden_size": 192, "multi_query": False},
    ),
    "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM", {"hidden_size": 192}),
    "gpt_neox, in sequence": (
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {"hidden_size": 192, "use_parallel_residual": False, "attention_bias": False},
    ),
    "gptj": ("gptj", "GPTJForCausalLM", {"hidden_size": 192, "rotary_dim": 12}),
    "helium": ("helium", "HeliumForCausalLM", {"hidden_size": 192, "pad_token_id": None}),
    "hunyuan": (
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "dynamic",
                "alpha": 50.0,
                "rope_theta": 1e4,
                "factor": 1.0,
            }
        },
    ),
    "ministral": (
        "ministral",
        "MinistralForCausalLM",
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": WINDOW},
    ),
    "ministral3": (
        "ministral3",
        "Ministral3ForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.3,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        },
    ),
    "mpt": (
        "mpt",
        "MptForCausalLM",
        {
            "hidden_size": 192,
            "max_seq_len": 256,
            "attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.3},
        },
    ),
    "mpt, uncut": (
        "mpt",
        "MptForCausalLM",
        {"hidden_size": 192, "max_seq_len": 256},
    ),
    "nemotron": ("nemotron", "NemotronForCausalLM", {}),
    "olmo": ("olmo", "OlmoForCausalLM", {"hidden_size": 192, "pad_token_id": None}),
    "olmo, cut": (
        "olmo",
        "OlmoForCausalLM",
        {"hidden_size": 192, "clip_qkv": 0.8, "pad_token_id": None},
    ),
    "olmo3": (
        "olmo3",
        "Olmo3ForCausalLM",
        {
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "pad_token_id": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "opt": ("opt", "OPTForCausalLM", {"hidden_size": 192, "ffn_dim": 80}),
    "opt, no biases": (
        "opt",
        "OPTForCausalLM",
        {
            "hidden_size": 192,
            "ffn_dim": 80,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
        },
    ),
    "opt, norms after": (
        "opt",
        "OPTForCausalLM",
        {
            "hidden_size": 192,
            "ffn_dim": 80,
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 96,
        },
    ),
    "opt, projections": (
        "opt",
        "OPTForCausalLM",
        {"hidden_size": 192, "ffn_dim": 80, "word_embed_proj_dim": 224},
    ),
    "youtu": ("youtu", "YoutuForCausalLM", LATENT | {"attention_bias": True}),
    "youtu, queries without a latent": (
        "youtu",
        "YoutuForCausalLM",
        LATENT | {"q_lora_rank": None, "rope_interleave": False, "v_head_dim": 64},
    ),
    "minicpm3": (
        "minicpm3",
        "MiniCPM3ForCausalLM",
        LATENT | {"dim_model_base": 24, "rope_parameters": longrope(16, 256)},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        LATENT | GROUPS | {"topk_method": "group_limited_greedy", "rope_parameters": YARN},
    ),
    "deepseek_v2, lite": (
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        LATENT | GROUPS | {"q_lora_rank": None, "n_group": None, "first_k_dense_replace": 1},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        LATENT | GROUPS | {"first_k_dense_replace": 1, "rope_parameters": YARN},
    ),
    "deepseek_v3, one group": (
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        LATENT | GROUPS | {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        LATENT | GROUPS | {"mlp_layer_types": ["sparse", "dense"], "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v32": ("deepseek_v32", "DeepseekV32ForCausalLM", SPARSE | {"index_topk": 16}),
    "deepseek_v32, few keys": (
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        SPARSE | {"index_topk": 4, "rope_parameters": YARN},
    ),
    "deepseek_v32, all keys": (
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        SPARSE | {"index_topk": 80},
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        "GlmMoeDsaForCausalLM",
        SPARSE
        | {"index_topk": 16, "num_hidden_layers": 4}
        | {"indexer_types": ["full", "shared", "full", "shared"]},
    ),
    "longcat_flash": (
        "longcat_flash",
        "LongcatFlashForCausalLM",
        LATENT
        | {"num_layers": 2, "num_hidden_layers": 4, "head_dim": 32, "ffn_hidden_size": 72}
        | {"expert_ffn_hidden_size": 40, "n_routed_experts": 6, "zero_expert_num": 3}
        | {"moe_topk": 4, "routed_scaling_factor": 1.5},
    ),
    "iquestcoder": ("iquestcoder", "IQuestCoderForCausalLM", {}),
    "persimmon": ("persimmon", "PersimmonForCausalLM", {"hidden_size": 192}),
    "seed_oss": ("seed_oss", "SeedOssForCausalLM", {"attention_out_bias": True, "mlp_bias": True}),
    "stablelm, parallel": (
        "stablelm",
        "StableLmForCausalLM",
        {"hidden_size": 192, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "starcoder2": ("starcoder2", "Starcoder2ForCausalLM", {"sliding_window": WINDOW}),
    "starcoder2, no biases": ("starcoder2", "Starcoder2ForCausalLM", {"use_bias": False}),
}
OP_BY_OP = {
    "llama4": "attention in chunks",
    "llama4, dense layers": "attention in chunks",
    "gemma3n": "streams",
    "gemma3n, one stream of two": "streams",
    "gemma4": "streams",
    "gemma4, values are keys": "factors of layers",
}
"""Cases whose steps are not recorded, and why."""


@cache
def peer_of(case: str, **other_fields: Any) -> Peer:
    model_type, architecture, fields = CASES[case]
    fields = {"head_dim": 32} | fields | other_fields
    if fields["head_dim"] is None:  # a property of the configuration, which cannot be set
        del fields["head_dim"]
    return make_peer(model_type, architecture, **fields)
