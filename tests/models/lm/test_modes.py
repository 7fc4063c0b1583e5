"""Greedy texts, bfloat16 and 8-bit caches of all architectures, beside transformers."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from sapwood.kernels.torch_ops import TorchKernels
from tests.models.lm.cases import CASES, peer_of
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import Peer, random_text

NUM_NEW = 12
ROUTED = [case for case, (_, _, fields) in CASES.items() if "num_experts_per_tok" in fields]
ROUTED += ["mixtral", "granitemoe"]
"""Where rounding may give a token another expert."""


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


# transformers generates nothing with a model that has states only.
@pytest.mark.parametrize("case", [case for case in CASES if case != "lfm2, no attention"])
def test_greedy_text_equals_generate(case: str) -> None:
    peer, prompt = peer_of(case), random_text(30)
    session = Session(make_decoder(peer.hf_config, peer.weights, TorchKernels()))
    got, new = [], prompt
    for _ in range(NUM_NEW):
        new = [int(session.step({"a": new})["a"][-1].argmax())]
        got += new
    model = deepcopy(peer.model)
    model.generation_config.eos_token_id = None
    whole = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False)
    assert got == whole[0, len(prompt) :].tolist()


def rounded(peer: Peer) -> Peer:
    """The same model in bfloat16; buffers, of which transformers makes angles, stay as they are."""
    model = deepcopy(peer.model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    weights = {name: weight.bfloat16() for name, weight in peer.weights.items()}
    return Peer(peer.hf_config, weights, model)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ROUTED])
def test_bfloat16_is_as_close_as_transformers_is(case: str) -> None:
    peer, text = peer_of(case), random_text(40)
    exact, other = peer.logits(text), rounded(peer)
    model = make_decoder(other.hf_config, other.weights, TorchKernels(), dtype=torch.bfloat16)
    got = Session(model, dtype=torch.bfloat16, state_dtype=torch.bfloat16).step({"a": text})["a"]
    assert 0 < rms(got - exact) < 1.5 * rms(other.logits(text).float() - exact)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in (*ROUTED, "lfm2, no attention")]
)
def test_an_8_bit_cache_changes_little(case: str) -> None:
    peer, text = peer_of(case), random_text(40)
    model = make_decoder(peer.hf_config, peer.weights, TorchKernels())
    got = Session(model, dtype=torch.int8).in_chunks("a", text, 7)
    exact = peer.logits(text)
    assert 0 < rms(got - exact) < 0.04 * exact.std().item()
