"""Forbidding tokens: every implementation against what the bits say."""

from __future__ import annotations

import pytest
import torch

from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels


@pytest.fixture(params=["reference", "torch", *CpuKernels.usable_isas()])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    made = {"reference": ReferenceKernels, "torch": TorchKernels}
    if request.param in made:
        return made[request.param]()
    return CpuKernels(isa=request.param, num_threads=2)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_rows_of_a_wider_memory(kernels: Kernels, dtype: torch.dtype) -> None:
    """Against the reference; words of all ones and of none are among them, as are infinities."""
    generator = torch.Generator().manual_seed(4)
    memory = torch.randn(5, 50_000, generator=generator).to(dtype)
    memory[:, ::7] = torch.inf
    memory[:, ::11] = -torch.inf
    masks = torch.randint(-(2**31), 2**31, (3, 1536), generator=generator).to(torch.int32)
    masks[:, ::3], masks[:, 1::5] = -1, 0
    mine, its = memory.clone(), memory.clone()
    kernels.mask_logits(mine[:, :49_152], masks, [4, 0, 2])
    ReferenceKernels().mask_logits(its[:, :49_152], masks, [4, 0, 2])
    assert torch.equal(mine, its)


@pytest.mark.skipif(not CpuKernels.usable_isas(), reason="the extension is not built")
def test_what_does_not_fit_is_refused() -> None:
    kernels = CpuKernels(num_threads=1)
    logits, masks = torch.zeros(2, 40), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(IndexError, match="rows"):
        kernels.mask_logits(logits, masks, [2])
    for wrong in (masks[:, :1], masks.long(), torch.zeros(2, 2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="do not fit"):
            kernels.mask_logits(logits, wrong, [0])
    with pytest.raises(ValueError, match="not contiguous"):
        kernels.mask_logits(torch.zeros(40, 2).T, masks, [0])
