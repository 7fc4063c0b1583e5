"""Every architecture of the registry is split over ranks, and gives the logits of one. Threads play
the ranks. What cannot be split is refused by name: docs/parallel.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.distributed.groups import Group
from sapwood.models.encoder.names import ENCODERS
from sapwood.models.registry import ARCHITECTURES
from tests.models.lm import bailing_linear, jet_nemotron, test_renamed
from tests.models.lm.cases import CASES, peer_of
from tests.models.lm.harness import make_decoder
from tests.models.lm.peer import SIZES, Peer, make_peer
from tests.models.lm.rank_threads import on_ranks
from tests.models.lm.routes import RoutedKernels, Routes
from tests.models.lm.test_rank_threads import logits_of

EVEN: dict[str, dict[str, Any]] = {
    "mamba": {"intermediate_size": 128},
    "falcon_mamba": {"intermediate_size": 128},
    "jamba": {"hidden_size": 64},
    "bamba": {"mamba_n_groups": 2},
    "zamba2, one block": {"num_key_value_heads": 6, "mamba_ngroups": 2},
    "kimi_linear": {"linear_num_heads": 4},
    "olmo_hybrid": {"num_attention_heads": 6, "num_key_value_heads": 2},
}
"""Sizes in place of those that two ranks cannot share evenly."""
OTHERS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SolarForCausalLM",
          "JetNemotronForCausalLM", "DeciLMForCausalLM", "BailingMoeV2_5ForCausalLM",
          "BailingMoeLinearV2ForCausalLM")  # fmt: skip
"""Architectures that are in none of the tables, or with heads there that two ranks cannot share."""
RENAMED = [name for name in test_renamed.CASES if name not in OTHERS]
OFTEN = {
    "minimax",  # lightning attention
    "BailingMoeV2_5ForCausalLM",  # whose norm ranks share
    "minimax_m2",  # norms over all heads
    "olmo_hybrid",
    "falcon_h1, norms",  # a gated norm over groups
    "gemma3n",  # sparse gates
    "longcat_flash",
    "zamba2",
}
"""Of the cases, those that `make test` tries; test_tensor_parallel.py has more."""


def peer_called(name: str) -> Peer:
    if name in CASES:
        return peer_of(name, **EVEN.get(name, {}))
    if name in RENAMED:
        return test_renamed.peer_of(name)
    if name == "SolarForCausalLM":
        return test_renamed.solar()
    if name == "JetNemotronForCausalLM":
        return jet_nemotron.peer()
    if name == "BailingMoeV2_5ForCausalLM":
        return bailing_linear.peer("ling", group_norm_size=1)
    if name == "BailingMoeLinearV2ForCausalLM":
        return bailing_linear.peer("ring", group_norm_size=2)
    if name == "DeciLMForCausalLM":
        return with_other_heads_in_each_layer(name)
    return make_peer(name.removesuffix("ForCausalLM").lower(), name)


def with_other_heads_in_each_layer(name: str) -> Peer:
    peer = make_peer("llama", name, num_key_value_heads=6)
    for part in ("k_proj", "v_proj"):
        key = f"model.layers.0.self_attn.{part}.weight"
        peer.weights[key] = peer.weights[key][:16]
    hf = SIZES | {"num_key_value_heads_per_layer": [2, 6], "num_key_value_heads": None}
    return Peer(hf | {"architectures": [name]}, peer.weights, peer.model)


def check(peer: Peer, num_ranks: int) -> None:
    """Routers choose as with one rank: sums over ranks may give a token other experts."""
    routes = Routes()

    def run(group: Group, routes: Routes) -> Tensor:
        kernels = RoutedKernels(routes)
        return logits_of(make_decoder(peer.hf_config, peer.weights, kernels, group=group), group)

    with torch.inference_mode():
        expected = run(Group(), routes)
    for found in on_ranks(num_ranks, lambda group: run(group, Routes(routes.calls))):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        name if name in OFTEN else pytest.param(name, marks=pytest.mark.long)
        for name in (*CASES, *RENAMED, *OTHERS)
    ],
)
def test_two_ranks_give_the_logits_of_one(name: str) -> None:
    check(peer_called(name), 2)


def test_no_architecture_is_left_out() -> None:
    tried = {architecture for _, architecture, _ in CASES.values()}
    tried |= {*RENAMED, *OTHERS}
    classes = {ARCHITECTURES.get(name) for name in tried}
    left_out = {
        name
        for name in ARCHITECTURES.names()
        if name not in ENCODERS and ARCHITECTURES.get(name) not in classes
    }
    assert left_out == OF_TOWERS


OF_TOWERS = {"GlmOcrForCausalLM", "PaddleOcrForCausalLM", "WhisperForConditionalGeneration"}
"""Whose oracles have a tower, so that these tables cannot make them: the first two share all code
that splits with GLM-4 and ERNIE 4.5, and ranks refuse the third."""


FOUR = {"hidden_size": 64, "num_attention_heads": 8, "head_dim": 16}
SCAN = {"mamba_d_state": 8, "mamba_chunk_size": 16, "mamba_n_groups": 1}
OVER_FOUR: dict[str, tuple[str, str, dict[str, Any]]] = {
    "norms over all heads, of which two ranks have the same": (
        "olmo2",
        "Olmo2ForCausalLM",
        FOUR | {"num_key_value_heads": 2},
    ),
    "norms over all heads of experts' model": (
        "olmoe",
        "OlmoeForCausalLM",
        {"hidden_size": 64, "num_attention_heads": 8, "num_experts": 4}
        | {"num_experts_per_tok": 2},
    ),
    "lightning attention": (
        "minimax",
        "MiniMaxForCausalLM",
        FOUR
        | {"num_local_experts": 4, "block_size": 16}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "one group of keys and queries": (
        "bamba",
        "BambaForCausalLM",
        FOUR | SCAN | {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    ),
    "two groups, each of two ranks": (
        "mamba2",
        "Mamba2ForCausalLM",
        {"num_heads": 8, "head_dim": 16, "hidden_size": 64, "n_groups": 2, "state_size": 12}
        | {"chunk_size": 16},
    ),
    "one group, and no norm": (
        "falcon_h1",
        "FalconH1ForCausalLM",
        FOUR | SCAN | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_rms_norm": False},
    ),
    "one group, and the norm before the gate": (
        "falcon_h1",
        "FalconH1ForCausalLM",
        FOUR
        | SCAN
        | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_rms_norm": True}
        | {"mamba_norm_before_gate": True},
    ),
    "one group beside experts": (
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        FOUR
        | SCAN
        | {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"], "num_local_experts": 4}
        | {"num_experts_per_tok": 2, "shared_intermediate_size": 40},
    ),
    "one group beside feed-forwards": (
        "nemotron_h",
        "NemotronHForCausalLM",
        FOUR
        | {"ssm_state_size": 8, "n_groups": 1, "mamba_num_heads": 8, "mamba_head_dim": 16}
        | {"chunk_size": 16, "hybrid_override_pattern": "M-*-"},
    ),
}


@pytest.mark.parametrize("name", OVER_FOUR)
def test_four_ranks_give_the_logits_of_one(name: str) -> None:
    model_type, architecture, fields = OVER_FOUR[name]
    check(make_peer(model_type, architecture, **fields), 4)
