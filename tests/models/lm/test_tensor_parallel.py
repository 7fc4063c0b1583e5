"""Two ranks, each with its part of the weights and of the KV cache, give the logits of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sapwood.distributed.groups import Group
from tests.models.lm import jet_nemotron
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import make_peer, random_text
from tests.models.lm.routes import Calls, RoutedKernels, Routes

DBRX = {
    "hidden_size": 48,
    "d_model": 48,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.2, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 80, "moe_num_experts": 4, "moe_top_k": 2},
}
LLAMA4 = {
    "head_dim": 16,
    "intermediate_size_mlp": 96,
    "attention_chunk_size": 16,
    "no_rope_layers": [1, 0],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "odd vocabulary, kv heads split": ("llama", "LlamaForCausalLM", {}),
    "shared kv head, tied": (
        "llama",
        "LlamaForCausalLM",
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "all biases": ("llama", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        "Gemma2ForCausalLM",
        {"head_dim": 16, "sliding_window": 12, "final_logit_softcapping": 2.0},
    ),
    "lfm2": (
        "lfm2",
        "Lfm2ForCausalLM",
        {
            "head_dim": 16,
            "full_attn_idxs": [1],
            "conv_bias": True,
            "block_multiple_of": 16,
            "tie_word_embeddings": False,
        },
    ),
    "starcoder2": ("starcoder2", "Starcoder2ForCausalLM", {}),
    "phi3": ("phi3", "Phi3ForCausalLM", {"pad_token_id": None}),
    "cohere": ("cohere", "CohereForCausalLM", {"use_qk_norm": True, "logit_scale": 1.0}),
    "glm4": ("glm4", "Glm4ForCausalLM", {"head_dim": 8, "pad_token_id": None}),
    "gpt2": ("gpt2", "GPT2LMHeadModel", {}),
    "gpt_bigcode": ("gpt_bigcode", "GPTBigCodeForCausalLM", {}),
    "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM", {"hidden_size": 96}),
    "gptj": ("gptj", "GPTJForCausalLM", {"rotary_dim": 4}),
    "falcon": (
        "falcon",
        "FalconForCausalLM",
        {"ffn_hidden_size": 80, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "bloom": ("bloom", "BloomForCausalLM", {}),
    "stablelm": ("stablelm", "StableLmForCausalLM", {"qk_layernorm": True, "hidden_size": 96}),
    "hunyuan": ("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", {"head_dim": 16}),
    "apertus": ("apertus", "ApertusForCausalLM", {}),
    "mixtral": ("mixtral", "MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"shared_expert_intermediate_size": 56},
    ),
    "gpt_oss": (
        "gpt_oss",
        "GptOssForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24, "head_dim": 32},
    ),
    "mixtral, whole experts": ("mixtral", "MixtralForCausalLM", {"num_local_experts": 4}),
    "dbrx": ("dbrx", "DbrxForCausalLM", DBRX),
    "dbrx, whole experts": ("dbrx", "DbrxForCausalLM", DBRX),
    "afmoe": (
        "afmoe",
        "AfmoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 16}
        | {"sliding_window": 24},
    ),
    "llama4": ("llama4_text", "Llama4ForCausalLM", LLAMA4),
    "llama4, whole experts": ("llama4_text", "Llama4ForCausalLM", LLAMA4),
    "youtu": (
        "youtu",
        "YoutuForCausalLM",
        {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 8}
        | {"q_lora_rank": 40, "attention_bias": True, "num_key_value_heads": 6},
    ),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"head_dim": 32, "v_head_dim": 24, "num_key_value_heads": 1, "sliding_window": 24}
        | {"layer_types": ["full_attention", "sliding_attention"]},
    ),
}
DELTA = {"head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
DELTA |= {"linear_key_head_dim": 12, "linear_value_head_dim": 20}
DELTA |= {"layer_types": ["linear_attention", "full_attention"]}
LATENT = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 20}
LATENT |= {"num_key_value_heads": 6, "pad_token_id": None}
SCAN = {"hidden_size": 192, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16}
CASES |= {
    "gated delta net": ("qwen3_5_text", "Qwen3_5ForCausalLM", DELTA),
    "gated delta net, projections by key heads": (
        "qwen3_next",
        "Qwen3NextForCausalLM",
        DELTA
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"shared_expert_intermediate_size": 56},
    ),
    "kimi delta attention": (
        "kimi_linear",
        "KimiLinearForCausalLM",
        LATENT
        | {"linear_num_heads": 4, "linear_head_dim": 16, "num_local_experts": 4}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_shared_experts": 1}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "bounded decays": (
        "bailing_hybrid",
        "BailingHybridForCausalLM",
        LATENT
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "layer_group_size": 2}
        | {"head_dim": 16},
    ),
    "mamba": (
        "mamba",
        "MambaForCausalLM",
        {"state_size": 6, "time_step_rank": 6, "intermediate_size": 128},
    ),
    "mamba 2": (
        "mamba2",
        "Mamba2ForCausalLM",
        {"num_heads": 6, "head_dim": 16, "n_groups": 2, "state_size": 12, "chunk_size": 16}
        | {"use_bias": True},
    ),
    "mamba 2 beside attention": (
        "falcon_h1",
        "FalconH1ForCausalLM",
        SCAN
        | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_rms_norm": True, "head_dim": 32}
        | {"ssm_multipliers": [0.8, 1.1, 0.9, 1.2, 0.7]},
    ),
}
Checkpoint = tuple[dict[str, Any], dict[str, Tensor]]
DTYPES = (torch.float32, torch.bfloat16)


def run_model(
    name: str,
    checkpoint: Checkpoint,
    group: Group,
    dtype: torch.dtype,
    routes: Routes | None = None,
) -> Tensor:
    """A prompt in two chunks beside another request, then a decode of both."""
    spreads = "whole experts" in name
    model = make_decoder(
        *checkpoint,
        RoutedKernels(routes or Routes()),
        group=group,
        dtype=dtype,
        spreads_experts=spreads,
    )
    session = Session(model, group=group, dtype=dtype, state_dtype=dtype)
    text = random_text(40)
    steps = [
        {"a": text[:20]},
        {"a": text[20:39], "b": text[:9]},
        {"a": text[39:], "b": text[9:10]},
    ]
    return torch.cat([logits for step in steps for logits in session.step(step).values()])


def run_rank(rank: int, size: int, folder: Path) -> None:
    """One process of the group: reads checkpoints.pt, leaves its logits in <rank>.pt."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size
    )
    assert dist.group.WORLD is not None
    group = Group.of(dist.group.WORLD)
    checkpoints: dict[str, Checkpoint] = torch.load(folder / "checkpoints.pt")
    calls: dict[tuple[str, torch.dtype], Calls] = torch.load(folder / "calls.pt")
    with torch.inference_mode():
        logits = {
            (name, dtype): run_model(name, checkpoint, group, dtype, Routes(calls[name, dtype]))
            for name, checkpoint in checkpoints.items()
            for dtype in DTYPES
        }
    torch.save(logits, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_logits_of_one(tmp_path: Path) -> None:
    peers = {name: make_peer(*case[:2], **case[2]) for name, case in CASES.items()}
    checkpoints = {name: (peer.hf_config, peer.weights) for name, peer in peers.items()}
    jet = jet_nemotron.peer()
    checkpoints["gated delta net, weights of each token"] = (jet.hf_config, jet.weights)
    torch.save(checkpoints, tmp_path / "checkpoints.pt")
    # Sums over ranks may give a token other experts, so the ranks follow the routes of one.
    routes = {(name, dtype): Routes() for name in checkpoints for dtype in DTYPES}
    alone = {
        (name, dtype): run_model(name, checkpoints[name], Group(), dtype, own)
        for (name, dtype), own in routes.items()
    }
    torch.save({key: own.calls for key, own in routes.items()}, tmp_path / "calls.pt")
    mp.spawn(run_rank, args=(2, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (name, dtype), logits in first.items():
        assert torch.equal(logits, second[name, dtype]), f"{name}: the ranks disagree"
        # In bf16 the partial sums of two ranks are rounded before they are added.
        # A delta rule's states carry such errors from token to token.
        in_bf16 = 0.25 if name.startswith("gated delta net") else 0.15
        tolerance = 1e-4 if dtype == torch.float32 else in_bf16
        torch.testing.assert_close(logits, alone[name, dtype], atol=tolerance, rtol=0)


def test_one_rank_alone_is_not_the_whole(tmp_path: Path) -> None:
    """The comparison above can fail: half of the weights gives other logits."""
    peer = make_peer("llama", "LlamaForCausalLM")
    whole = run_model("llama", (peer.hf_config, peer.weights), Group(), torch.float32)
    halved = dict(peer.weights)
    for name in halved:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            halved[name] = halved[name].clone()
            halved[name][:, halved[name].shape[1] // 2 :] = 0.0
    half = run_model("llama", (peer.hf_config, halved), Group(), torch.float32)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(half, whole, atol=0.15, rtol=0)
