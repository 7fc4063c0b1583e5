from __future__ import annotations

import torch

from sapwood.layers.norm import LayerNorm


def test_layer_norm_centres_scales_and_shifts() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = LayerNorm(16, eps=1e-6, device=torch.device("cpu"), dtype=torch.float32)
    weight, bias = (torch.randn(16, generator=generator) for _ in range(2))
    norm.targets()["weight"].place(weight)
    norm.targets()["bias"].place(bias)
    x = 3 + 2 * torch.randn(5, 16, generator=generator)
    deviation = (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    want = (x - x.mean(-1, keepdim=True)) / deviation * weight + bias
    torch.testing.assert_close(norm(x), want)
