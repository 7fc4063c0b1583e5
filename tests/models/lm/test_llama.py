"""Llama against transformers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels
from tests.models.lm.checks import CHECKS
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import Peer, make_peer

CASES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one kv head per head": {"num_key_value_heads": 6},
    "one kv head": {"num_key_value_heads": 1},
    "wide heads": {"num_attention_heads": 4, "head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e3}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@cache
def peer_of(case: str) -> Peer:
    return make_peer("llama", "LlamaForCausalLM", **CASES[case])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernels", [ReferenceKernels(), TorchKernels()], ids=lambda k: k.name)
def test_logits_equal_transformers(kernels: Kernels, case: str, check: str) -> None:
    peer = peer_of(case)
    CHECKS[check](Session(make_decoder(peer.hf_config, peer.weights, kernels)), peer)
