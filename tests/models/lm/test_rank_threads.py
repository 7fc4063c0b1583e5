"""Four ranks, and ranks of quantised files: the logits of one rank. Threads play the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.distributed.groups import Group
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.build import Groups
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import make_peer, random_text
from tests.models.lm.rank_threads import on_ranks
from tests.models.lm.test_checkpoints import FIELDS, load, peer_of, write
from tests.models.lm.test_quantized_experts import left_as_it_is
from tests.quantized_checkpoints import CASES as FORMATS
from tests.quantized_checkpoints import Maker
from tests.tiers import long_only

WIDE = {"hidden_size": 64, "num_attention_heads": 8, "head_dim": 16}
ALL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 4}
"""Sums over ranks may give a token other experts if it has only some."""
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama, two heads of keys for four ranks": ("llama", "LlamaForCausalLM", WIDE),
    "llama, tied": ("llama", "LlamaForCausalLM", WIDE | {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", "MixtralForCausalLM", WIDE | ALL_EXPERTS),
    "latent": (
        "youtu",
        "YoutuForCausalLM",
        {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 8}
        | {"q_lora_rank": 40, "num_attention_heads": 8, "num_key_value_heads": 8},
    ),
    "states": (
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 12}
        | {"linear_value_head_dim": 20, "full_attention_interval": 2, "rms_norm_eps": 1e-5}
        | {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 40}
        | {"shared_expert_intermediate_size": 56, "mlp_only_layers": [1]}
        | WIDE,
    ),
    "states and latent": (
        "kimi_linear",
        "KimiLinearForCausalLM",
        {"linear_num_heads": 4, "linear_head_dim": 16, **ALL_EXPERTS}
        | {"num_shared_experts": 1, "moe_intermediate_size": 40}
        | {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 20}
        | {"num_attention_heads": 8, "num_key_value_heads": 8, "pad_token_id": None}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
}
TEXT = random_text(40)


def logits_of(model: Any, group: Group) -> Tensor:
    """A prompt in two chunks beside another request, then a decode of both."""
    session = Session(model, group=group)
    steps = [{"a": TEXT[:20]}, {"a": TEXT[20:39], "b": TEXT[:9]}, {"a": TEXT[39:], "b": TEXT[9:10]}]
    return torch.cat([logits for step in steps for logits in session.step(step).values()])


@pytest.mark.parametrize("name", CASES)
def test_four_ranks_give_the_logits_of_one(name: str) -> None:
    model_type, architecture, fields = CASES[name]
    peer = make_peer(model_type, architecture, **fields)

    def run(group: Group) -> Tensor:
        model = make_decoder(peer.hf_config, peer.weights, TorchKernels(), group=group)
        return logits_of(model, group)

    with torch.inference_mode():
        expected = run(Group())
    for found in on_ranks(4, run):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "gptq 4, act-order, zero points",  # a rank's inputs are in any groups
        "awq, groups of 64",  # which a rank's 96 inputs cut
        *long_only(*(name for name in FORMATS if "act-order" not in name and "64" not in name)),
    ],
)
def test_two_ranks_of_a_quantised_file(name: str, mixture: bool, tmp_path: Path) -> None:
    form = FORMATS[name]
    peer = peer_of("llama", tied=False)
    if mixture:
        peer = make_peer("mixtral", "MixtralForCausalLM", **FIELDS, **ALL_EXPERTS)

    def make(module: str) -> Maker:
        return left_as_it_is if module.endswith(".gate") else form.make

    files, _ = write(tmp_path, peer, form.config, make)

    def run(group: Group) -> Tensor:
        model = load(files, TorchKernels(), groups=Groups.tensor_parallel(group))
        return logits_of(model, group)

    with torch.inference_mode():
        expected = run(Group())
    for found in on_ranks(2, run):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
