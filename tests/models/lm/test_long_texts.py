"""Models that rotate long texts otherwise than short ones, against transformers text by text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sapwood.kernels.torch_ops import TorchKernels
from tests.models.lm.cases import longrope
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import Peer, make_peer, random_text
from tests.models.lm.test_architectures import native_or_skip

SWITCH_LENGTH, CONTEXT = 24, 60
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        "Phi3ForCausalLM",
        {"hidden_size": 192, "pad_token_id": None, "max_position_embeddings": CONTEXT}
        | {"rope_parameters": longrope(16, SWITCH_LENGTH), "original_max_position_embeddings": 24},
    ),
    "dynamic": (
        "llama",
        "LlamaForCausalLM",
        {"max_position_embeddings": SWITCH_LENGTH, "rope_parameters": DYNAMIC},
    ),
}


def peer_of(case: str) -> Peer:
    """Made anew each time: transformers' dynamic rotation remembers the longest text."""
    model_type, architecture, fields = CASES[case]
    return make_peer(model_type, architecture, head_dim=32, **fields)


@pytest.mark.parametrize("how", ["torch", "native", "recorded"])
@pytest.mark.parametrize("case", CASES)
def test_a_short_text_beside_a_long_one(case: str, how: str) -> None:
    """transformers gives each its own rotation; a dynamic one depends on the length of a long text,
    which is the whole context here."""
    kernels = TorchKernels() if how == "torch" else native_or_skip()
    peer = peer_of(case)
    model = make_decoder(peer.hf_config, peer.weights, kernels, context_length=CONTEXT)
    assert model.config.switch_length == SWITCH_LENGTH
    session = Session(model, recorded_by=kernels if how == "recorded" else None)
    session.short.add("short")
    short, long = random_text(SWITCH_LENGTH), random_text(CONTEXT, seed=1)
    parts = []
    for step in (
        {"short": short[:13], "long": long[:40]},
        {"short": short[13:22], "long": long[40:41]},
        {"short": short[22:23], "long": long[41:59]},
        {"short": short[23:], "long": long[59:]},
    ):
        parts.append(session.step(step))
    for name, text in (("short", short), ("long", long)):
        got = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(got, peer.logits(text), atol=1e-4, rtol=0)
