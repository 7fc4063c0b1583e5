"""Qwen2 against transformers."""

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
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@cache
def peer_of(case: str) -> Peer:
    return make_peer("qwen2", "Qwen2ForCausalLM", **CASES[case])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernels", [ReferenceKernels(), TorchKernels()], ids=lambda k: k.name)
def test_logits_equal_transformers(kernels: Kernels, case: str, check: str) -> None:
    peer = peer_of(case)
    CHECKS[check](Session(make_decoder(peer.hf_config, peer.weights, kernels)), peer)


@cache
def windowed_peer() -> Peer:
    return make_peer(
        "qwen2", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=24, max_window_layers=1
    )


@pytest.mark.parametrize("check", CHECKS)
def test_logits_equal_transformers_beyond_the_window(check: str) -> None:
    peer = windowed_peer()
    model = make_decoder(peer.hf_config, peer.weights, ReferenceKernels())
    assert model.config.has_windows
    CHECKS[check](Session(model), peer)
