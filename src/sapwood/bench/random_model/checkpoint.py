"""A transformers checkpoint with random weights.

Layers are Qwen3's, with a mixture of experts where the shape has experts; those of DeepSeek V3
where it has latent rows, and of Qwen3-Next or Granite 4 where it has states: llama.cpp and
transformers have all of them as well."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sapwood.base.errors import ConfigError
from sapwood.bench.ops.options import DeltaHeads, ScanHeads, Shape
from sapwood.bench.peers.conversion import TOKENIZER_FILES
from sapwood.kernels.latent import LatentSizes

CONTEXT_LENGTH = 8192
SCANS_PER_ATTENTION = 7
"""Layers of Mamba 2 before each layer of attention, as in Granite 4."""


def write_checkpoint(
    shape: Shape, num_layers: int, directory: Path, *, tokenizer: Path, dtype: str, seed: int
) -> int:
    """Write config.json, the weights and the tokenizer; returns the number of weights.

    tokenizer  directory with the tokenizer's files
    Raises     ConfigError if the directory exists, or the tokenizer has more tokens than the shape
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    if directory.exists():
        raise ConfigError(f"{directory} exists already; remove it, or name another directory")
    num_tokens = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
    if num_tokens > shape.vocab:
        raise ConfigError(
            f"the tokenizer has {num_tokens} tokens but the shape only {shape.vocab}; "
            "choose another --tokenizer or --shape"
        )
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**config_of(shape, num_layers))
    make: Any = AutoModelForCausalLM.from_config
    model = make(config, dtype=getattr(torch, dtype))
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, directory / name)
    return sum(weight.numel() for weight in model.parameters())


def config_of(shape: Shape, num_layers: int) -> dict[str, Any]:
    """The model's config.json. Input and output embeddings are one tensor."""
    config = {
        "model_type": "qwen3",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if shape.num_experts:
        config |= {
            "model_type": "qwen3_moe",
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.num_chosen,
            "moe_intermediate_size": shape.inner,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if shape.latent is not None:
        config |= _latent_fields(shape, shape.latent)
    if shape.delta is not None:
        config |= _delta_fields(shape, shape.delta)
    if shape.scan is not None:
        config |= _scan_fields(shape, shape.scan, num_layers)
    return config


def _latent_fields(shape: Shape, sizes: LatentSizes) -> dict[str, Any]:
    """Of DeepSeek V3, with a mixture in every layer."""
    return {
        "model_type": "deepseek_v3",
        "head_dim": sizes.rope_dim,  # as transformers has it
        "num_key_value_heads": shape.num_heads,
        "kv_lora_rank": sizes.rank,
        "q_lora_rank": sizes.query_rank,
        "qk_rope_head_dim": sizes.rope_dim,
        "qk_nope_head_dim": sizes.nope_dim,
        "v_head_dim": sizes.value_dim,
        "n_routed_experts": shape.num_experts,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
    }


def _delta_fields(shape: Shape, heads: DeltaHeads) -> dict[str, Any]:
    """Of Qwen3-Next, where every fourth layer has attention."""
    return {
        "model_type": "qwen3_next",
        "shared_expert_intermediate_size": shape.inner,
        "linear_num_key_heads": heads.num_key_heads,
        "linear_num_value_heads": heads.num_value_heads,
        "linear_key_head_dim": heads.head_dim,
        "linear_value_head_dim": heads.head_dim,
    }


def _scan_fields(shape: Shape, heads: ScanHeads, num_layers: int) -> dict[str, Any]:
    """Of Granite 4 without experts, which rotates nothing. Every eighth layer has attention."""
    period = SCANS_PER_ATTENTION + 1
    return {
        "model_type": "granitemoehybrid",
        "shared_intermediate_size": shape.inner,
        "num_local_experts": 0,
        "position_embedding_type": "nope",
        "layer_types": [
            "linear_attention" if (index + 1) % period else "full_attention"
            for index in range(num_layers)
        ],
        "attention_multiplier": shape.head_dim**-0.5,
        "mamba_n_heads": heads.num_heads,
        "mamba_d_head": heads.head_dim,
        "mamba_d_state": heads.state_size,
        "mamba_expand": heads.num_heads * heads.head_dim // shape.hidden,
    }
