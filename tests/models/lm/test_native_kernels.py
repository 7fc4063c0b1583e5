"""Decoders over the C++ kernels against transformers; skipped where this build has none."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.registry import Need
from sapwood.layers.quantization import SCHEMES
from tests.models.lm.checks import CHECKS
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import Peer, make_peer, random_text

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


WIDE = ("llama", "LlamaForCausalLM", {"hidden_size": 96, "intermediate_size": 128, "head_dim": 32})
"""Whole blocks of 32 inputs in every layer, as 4-bit weights need."""


@cache
def peer_of(case: str) -> Peer:
    model_type, architecture, fields = WIDE if case == "wide" else CASES[case]
    return make_peer(model_type, architecture, **fields)


@pytest.fixture
def kernels() -> CpuKernels:
    need = Need(device="cpu", dtype=torch.float32, head_dim=32, page_size=8)
    reason = CpuKernels.why_not(need)
    if reason is not None:
        pytest.skip(f"the C++ kernels cannot run here: {reason}")
    return CpuKernels()


@pytest.mark.parametrize("recorded", [False, True], ids=["op by op", "recorded"])
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(
    case: str, check: str, recorded: bool, kernels: CpuKernels
) -> None:
    peer = peer_of(case)
    model = make_decoder(peer.hf_config, peer.weights, kernels)
    CHECKS[check](Session(model, recorded_by=kernels if recorded else None), peer)


@pytest.mark.parametrize(
    ("case", "scheme"),
    [(case, scheme) for case in CASES for scheme in ("none", "w8a8_int8")] + [("wide", "w4a8")],
)
def test_a_recorded_step_equals_its_ops_bit_by_bit(
    case: str, scheme: str, kernels: CpuKernels
) -> None:
    """In bfloat16, where another order of operations would show; a prompt, a mixture, decodes."""
    peer = peer_of(case)
    dtype = torch.bfloat16
    weights = {name: weight.to(dtype) for name, weight in peer.weights.items()}
    how = SCHEMES.get(scheme)()
    model = make_decoder(peer.hf_config, weights, kernels, dtype=dtype, scheme=how)
    eager = Session(model, dtype=dtype)
    recorded = Session(model, dtype=dtype, recorded_by=kernels)
    for step in (
        {"a": random_text(40)},
        {"a": [5], "b": random_text(19, seed=1), "c": random_text(3, seed=2)},
        {"a": [6], "b": [7], "c": [8]},
        {"a": [9]},
    ):
        expected, got = eager.step(step), recorded.step(step)
        for name in step:
            assert torch.equal(expected[name], got[name]), name
