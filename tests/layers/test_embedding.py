from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.build import Build
from sapwood.layers.embedding import LMHead, VocabEmbedding

VOCAB, HIDDEN = 40, 100


def filled(*, tied: bool) -> LMHead:
    """An output layer with a bias, a factor and a cap."""
    build = Build(kernels=TorchKernels(), device=torch.device("cpu"), dtype=torch.float32)
    embedding = VocabEmbedding(build, VOCAB, HIDDEN) if tied else None
    head = LMHead(build, VOCAB, HIDDEN, tied=embedding, scale=0.5, soft_cap=3.0, bias=True)
    generator = torch.Generator().manual_seed(1)
    targets = head.targets()
    targets["bias"].place(torch.randn(VOCAB, generator=generator))
    weight = head.tied_target() if tied else targets["weight"]
    weight.place(torch.randn(VOCAB, HIDDEN, generator=generator))
    head.pack()
    return head


@pytest.mark.parametrize("tied", [False, True])
def test_an_output_layer_for_some_tokens_has_their_logits(tied: bool) -> None:
    head = filled(tied=tied)
    hidden = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(2))
    token_ids = torch.tensor([31, 0, 39, 7])
    some: Tensor = head.only(token_ids)(hidden)
    torch.testing.assert_close(some, head(hidden)[:, token_ids])
