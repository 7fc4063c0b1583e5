"""A model that is computed layer by layer is the model."""

from __future__ import annotations

import pytest
import torch

from sapwood.convert.walk import Walk
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.build import Build
from sapwood.models.registry import decoder_class, read_decoder
from tests.models.lm.cases import peer_of
from tests.models.lm.peer import random_text

LENGTH = 40


@pytest.mark.parametrize(
    "case",
    ["opt", "phi", "phi, tied", "nemotron", "exaone4", "stablelm, parallel", "gemma3", "apertus"],
)
@torch.inference_mode()
def test_layer_by_layer_gives_the_likelihood_of_the_whole(case: str) -> None:
    """With learned positions, parallel layers, biases of the output layer, and other names."""
    peer, text = peer_of(case), random_text(LENGTH)
    config = read_decoder(peer.hf_config)
    build = Build(kernels=TorchKernels(), device=torch.device("cpu"), dtype=torch.float32)
    walk = Walk(decoder_class(config.architecture)(config, build), window=LENGTH, page_size=8)
    windows = [torch.tensor(text)]
    hidden = walk.embed(peer.weights, windows)
    for index in range(walk.num_layers):
        layer = walk.layer(index, peer.weights)
        *_, (stepped,) = walk.steps(layer, hidden)
        hidden = walk.run(layer, hidden)
        torch.testing.assert_close(stepped, hidden[0])
    logits = peer.logits(text)[:-1]
    want = torch.nn.functional.cross_entropy(logits, windows[0][1:])
    got = walk.negative_log_likelihood(peer.weights, hidden, windows)
    assert got == pytest.approx(want.item(), abs=1e-4)
