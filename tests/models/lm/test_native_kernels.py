"""Decoders over the C++ kernels against transformers; skipped where this build has none."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.registry import Need
from tests.models.lm.checks import CHECKS
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import Peer, make_peer

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama, biases": (
        "llama",
        "LlamaForCausalLM",
        {"head_dim": 32, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2, tied": (
        "qwen2",
        "Qwen2ForCausalLM",
        {"hidden_size": 192, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {"head_dim": 128}),
}


@cache
def peer_of(case: str) -> Peer:
    model_type, architecture, fields = CASES[case]
    return make_peer(model_type, architecture, **fields)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, check: str) -> None:
    peer = peer_of(case)
    need = Need(device="cpu", dtype=torch.float32, head_dim=32, page_size=8)
    reason = CpuKernels.why_not(need)
    if reason is not None:
        pytest.skip(f"the C++ kernels cannot run here: {reason}")
    CHECKS[check](Session(make_decoder(peer.hf_config, peer.weights, CpuKernels())), peer)
