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
from sapwood.kernels.torch_ops import TorchKernels
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import make_peer, random_text

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
}
BF16_TOLERANCE = {"qwen2_moe": 0.5, "gpt_oss": 0.5, "mixtral": 0.5, "mixtral, whole experts": 0.5}
"""Where it is above 0.15: rounding may give a token another expert."""
Checkpoint = tuple[dict[str, Any], dict[str, Tensor]]


def run_model(name: str, checkpoint: Checkpoint, group: Group, dtype: torch.dtype) -> Tensor:
    """A prompt in two chunks beside another request, then a decode of both."""
    spreads = "whole experts" in name
    model = make_decoder(
        *checkpoint, TorchKernels(), group=group, dtype=dtype, spreads_experts=spreads
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
    with torch.inference_mode():
        logits = {
            (name, dtype): run_model(name, checkpoint, group, dtype)
            for name, checkpoint in checkpoints.items()
            for dtype in (torch.float32, torch.bfloat16)
        }
    torch.save(logits, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_logits_of_one(tmp_path: Path) -> None:
    peers = {name: make_peer(*case[:2], **case[2]) for name, case in CASES.items()}
    checkpoints = {name: (peer.hf_config, peer.weights) for name, peer in peers.items()}
    torch.save(checkpoints, tmp_path / "checkpoints.pt")
    mp.spawn(run_rank, args=(2, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (name, dtype), logits in first.items():
        assert torch.equal(logits, second[name, dtype]), f"{name}: the ranks disagree"
        alone = run_model(name, checkpoints[name], Group(), dtype)
        # In bf16 the partial sums of two ranks are rounded before they are added.
        tolerance = 1e-4 if dtype == torch.float32 else BF16_TOLERANCE.get(name, 0.15)
        torch.testing.assert_close(logits, alone, atol=tolerance, rtol=0)


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
