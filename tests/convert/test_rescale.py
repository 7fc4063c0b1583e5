"""Factors moved into weights change nothing but the rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.convert.calibration import sample_inputs
from sapwood.convert.rescale import Rescaler
from sapwood.convert.scheme import WeightScheme
from sapwood.convert.walk import Walk
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.build import Build
from sapwood.models.config import DecoderConfig
from sapwood.models.registry import decoder_class, read_decoder
from tests.models.lm.peer import Peer, make_peer, random_text

CPU = torch.device("cpu")
WINDOW = 48
INT8 = WeightScheme(num_bits=8)
INT4 = WeightScheme(num_bits=4, strategy="group", group_size=16, rounds_activations=False)
PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grouped queries": ("llama", "LlamaForCausalLM", {}),
    "biases": ("qwen2", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "head norms": ("qwen3", "Qwen3ForCausalLM", {"head_dim": 16}),
}


def make_walk(peer: Peer) -> tuple[Walk, DecoderConfig]:
    decoder = read_decoder(peer.hf_config)
    build = Build(kernels=TorchKernels(), device=CPU, dtype=torch.float32)
    architecture = decoder_class(decoder.architecture)(decoder, build)
    return Walk(architecture, window=WINDOW, page_size=16), decoder


def windows(count: int) -> list[Tensor]:
    return [torch.tensor(random_text(WINDOW, seed=seed)) for seed in range(count)]


def linear_names(peer: Peer) -> frozenset[str]:
    return frozenset(
        name.removesuffix(".weight") for name in peer.weights if name.endswith("proj.weight")
    )


@pytest.fixture(params=PEERS.values(), ids=PEERS)
def peer(request: pytest.FixtureRequest) -> Peer:
    model_type, architecture, fields = request.param
    return make_peer(model_type, architecture, **fields)


@torch.inference_mode()
def test_layer_by_layer_is_the_model_of_transformers(peer: Peer) -> None:
    walk, decoder = make_walk(peer)
    texts = windows(2)
    hidden = walk.embed(peer.weights, texts)
    for index in range(decoder.num_layers):
        before = [x.clone() for x in hidden]
        after = walk.run(walk.layer(index, peer.weights), hidden)
        assert all(torch.equal(a, b) for a, b in zip(before, hidden, strict=True))
        hidden = after
    found = walk.negative_log_likelihood(peer.weights, hidden, texts)
    expected = []
    for text in texts:
        scores = peer.logits(text.tolist())[:-1].log_softmax(dim=-1)
        expected.append(-scores.gather(1, text[1:, None]).mean().item())
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=["int8", "int4"])
@torch.inference_mode()
def test_a_rescaled_layer_computes_the_same(peer: Peer, scheme: WeightScheme) -> None:
    walk, decoder = make_walk(peer)
    # Inputs of very different sizes, so that factors are found.
    tensors = {name: tensor.clone() for name, tensor in peer.weights.items()}
    name = "model.layers.0.input_layernorm.weight"
    tensors[name] = tensors[name] * torch.randn(len(tensors[name])).mul(1.5).exp()
    hidden = walk.embed(tensors, windows(3))
    layer = walk.layer(0, tensors)
    samples = sample_inputs(walk, layer, hidden)
    rescaler = Rescaler(decoder, scheme, linear_names(peer))
    rescaled = rescaler.rescaled("model.layers.0", tensors, samples)
    again = walk.layer(0, rescaled)
    for found, expected in zip(walk.run(again, hidden), walk.run(layer, hidden), strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm()
    changed = {key for key in tensors if not torch.equal(tensors[key], rescaled[key])}
    assert name in changed
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert all(key.startswith("model.layers.0.") for key in changed)


@torch.inference_mode()
def test_only_places_whose_layers_are_all_converted_are_rescaled(peer: Peer) -> None:
    walk, decoder = make_walk(peer)
    hidden = walk.embed(peer.weights, windows(2))
    samples = sample_inputs(walk, walk.layer(0, peer.weights), hidden)
    only = frozenset({"model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"})
    rescaled = Rescaler(decoder, INT8, only).rescaled("model.layers.0", peer.weights, samples)
    assert all(torch.equal(rescaled[name], peer.weights[name]) for name in peer.weights)
