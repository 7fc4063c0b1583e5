"""Forbidding tokens: every implementation against what the bits say."""

from __future__ import annotations

import pytest
import torch

from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels


@pytest.fixture(params=["reference", "torch", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "cpu":
        if not CpuKernels.usable_isas():
            pytest.skip("the extension is not built")
        return CpuKernels(num_threads=1)
    return {"reference": ReferenceKernels, "torch": TorchKernels}[request.param]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 260])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1], []])
def test_bits(kernels: Kernels, dtype: torch.dtype, vocab: int, rows: list[int]) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(3, vocab, generator=generator).to(dtype)
    words = -(-vocab // 32)
    masks = torch.randint(-(2**31), 2**31, (len(rows), words), generator=generator)
    masks = masks.to(torch.int32)
    expected = logits.clone()
    for i, row in enumerate(rows):
        for token in range(vocab):
            if not int(masks[i, token // 32]) >> (token % 32) & 1:
                expected[row, token] = -torch.inf
    kernels.mask_logits(logits, masks, rows)
    assert torch.equal(logits, expected)
