"""Greedy texts, bfloat16 and 8-bit caches of all architectures, beside transformers."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from sapwood.kernels.torch_ops import TorchKernels
from sapwood.models.config import DecoderConfig
from tests.models.lm.cases import CASES, peer_of
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import Peer, random_text
from tests.models.lm.routes import RoutedKernels, Routes, routed

NUM_NEW = 12


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
    for name, buffer in model.named_buffers():
        if name.endswith(("_decay", "slope_rate")):  # MiniMax's, which it multiplies as they are
            buffer.data = buffer.data.bfloat16()
    weights = {name: weight.bfloat16() for name, weight in peer.weights.items()}
    return Peer(peer.hf_config, weights, model)


def check_few_moved(routes: Routes, config: DecoderConfig, num_tokens: int) -> None:
    assert routes.num_moved <= 0.1 * num_tokens * config.num_layers, "more than near ties"


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_close_as_transformers_is(case: str) -> None:
    """Where tokens go to experts, both follow the routes of exact runs."""
    peer, text = peer_of(case), random_text(40)
    theirs, ours = Routes(), Routes()
    with routed(peer.model, theirs):
        exact = peer.logits(text)
    Session(make_decoder(peer.hf_config, peer.weights, RoutedKernels(ours))).step({"a": text})
    other, like_theirs, like_ours = rounded(peer), Routes(theirs.calls), Routes(ours.calls)
    with routed(other.model, like_theirs):
        bound = rms(other.logits(text).float() - exact)
    model = make_decoder(
        other.hf_config, other.weights, RoutedKernels(like_ours), dtype=torch.bfloat16
    )
    got = Session(model, dtype=torch.bfloat16, state_dtype=torch.bfloat16).step({"a": text})["a"]
    check_few_moved(like_ours, model.config, len(text))
    assert 0 < rms(got - exact) < 1.5 * bound


NO_8_BIT = {
    "lfm2, no attention",  # nothing to keep in 8 bits
    # Rounded keys of an indexer choose other keys to attend to, which is no small error.
    "deepseek_v32",
    "deepseek_v32, few keys",
    "glm_moe_dsa",
}


@pytest.mark.parametrize("case", [case for case in CASES if case not in NO_8_BIT])
def test_an_8_bit_cache_changes_little(case: str) -> None:
    peer, text = peer_of(case), random_text(40)
    ours = Routes()
    exact_model = make_decoder(peer.hf_config, peer.weights, RoutedKernels(ours))
    Session(exact_model).in_chunks("a", text, 7)
    like_ours = Routes(ours.calls)
    model = make_decoder(peer.hf_config, peer.weights, RoutedKernels(like_ours))
    got = Session(model, dtype=torch.int8).in_chunks("a", text, 7)
    exact = peer.logits(text)
    check_few_moved(like_ours, model.config, len(text))
    assert 0 < rms(got - exact) < 0.04 * exact.std().item()


def test_other_routes_are_what_rounding_errors_are_not() -> None:
    """With an 8-bit cache one token of this model goes to another expert; with the routes of the
    exact run the error is small, and so it is what the route makes of it that is not."""
    peer, text = peer_of("olmoe"), random_text(40)
    exact, ours = peer.logits(text), Routes()
    model = make_decoder(peer.hf_config, peer.weights, RoutedKernels(ours))
    Session(model).in_chunks("a", text, 7)
    like_ours, errors = Routes(ours.calls), []
    for kernels in (TorchKernels(), RoutedKernels(like_ours)):
        model = make_decoder(peer.hf_config, peer.weights, kernels)
        got = Session(model, dtype=torch.int8).in_chunks("a", text, 7)
        errors.append(rms(got - exact))
    assert like_ours.num_moved
    assert errors[1] < 0.5 * errors[0]
