from __future__ import annotations

import torch

from sapwood.kernels.reference import ReferenceKernels
from sapwood.layers.build import Build
from sapwood.layers.norm import LayerNorm, RMSNorm

BUILD = Build(kernels=ReferenceKernels(), device=torch.device("cpu"), dtype=torch.float32)


def test_layer_norm_centres_scales_and_shifts() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = LayerNorm(BUILD, 16, eps=1e-6)
    weight, bias = (torch.randn(16, generator=generator) for _ in range(2))
    norm.targets()["weight"].place(weight)
    norm.targets()["bias"].place(bias)
    x = 3 + 2 * torch.randn(5, 16, generator=generator)
    deviation = (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    want = (x - x.mean(-1, keepdim=True)) / deviation * weight + bias
    torch.testing.assert_close(norm(x), want)


def test_a_norm_may_add_one_to_its_weight() -> None:
    plain, added = RMSNorm(BUILD, 4, eps=1e-6), RMSNorm(BUILD, 4, eps=1e-6, adds_one=True)
    weight = torch.tensor([0.5, -1.0, 0.0, 2.0])
    added.targets()["weight"].place(weight)
    plain.targets()["weight"].place(weight + 1)
    x = torch.randn(3, 4)
    assert torch.equal(added(x), plain(x))
