"""Weights of 16 bits with float32 activations: the products are those of their float32 copies, bit by
bit, and half the bytes are kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels

NARROW = [torch.bfloat16, torch.float16]
# One row and two are widened in registers, a few more part by part, many panel by panel.
ROWS = [1, 2, 3, 7, 12, 13, 96, 97, 160]

pytestmark = pytest.mark.skipif(not CpuKernels.usable_isas(), reason="no native kernels")


@pytest.fixture(params=CpuKernels.usable_isas())
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    return CpuKernels(isa=request.param, num_threads=2)


def make_weight(num_out: int, num_in: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(num_in)
    weight = torch.randn(num_out, num_in)
    weight[0, :4] = torch.tensor([0.0, 3e-8, 6e-5, 60000.0])  # subnormal and large in float16
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("num_out", "num_in"), [(96, 64), (70, 400), (33, 101), (300, 800)])
def test_products_are_those_of_a_float32_copy(
    kernels: CpuKernels, dtype: torch.dtype, num_out: int, num_in: int
) -> None:
    weight, bias = make_weight(num_out, num_in, dtype), torch.randn(num_out)
    narrow = kernels.pack_linear(weight, bias, torch.float32)
    wide = kernels.pack_linear(weight.float(), bias)
    for rows in ROWS:
        x = torch.randn(rows, num_in)
        assert torch.equal(narrow(x), wide(x)), rows


@pytest.mark.parametrize("dtype", NARROW)
def test_a_row_does_not_depend_on_the_rows_beside_it(
    kernels: CpuKernels, dtype: torch.dtype
) -> None:
    layer = kernels.pack_linear(make_weight(96, 500, dtype), None, torch.float32)
    x = torch.randn(160, 500)
    together = layer(x)
    for row in (0, 1, 50, 159):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("dtype", NARROW)
def test_half_the_bytes_are_kept(kernels: CpuKernels, dtype: torch.dtype) -> None:
    layer = kernels.pack_linear(torch.ones(64, 32).to(dtype), None, torch.float32)
    assert layer._weight.element_size() * layer._weight.numel() == 64 * 32 * 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("hidden", [32, 37, 576])
def test_an_embedding_is_read_as_float32(
    kernels: CpuKernels, dtype: torch.dtype, hidden: int
) -> None:
    table = make_weight(50, hidden, dtype)
    ids = torch.tensor([0, 49, 7, 7])
    others: list[Kernels] = [ReferenceKernels(), TorchKernels()]
    for each in [kernels, *others]:
        found = each.embedding(ids, table, torch.float32)
        assert found.dtype == torch.float32
        assert torch.equal(found, table[ids].float())


def test_other_kernels_widen_once() -> None:
    weight, x = make_weight(40, 64, torch.bfloat16), torch.randn(3, 64)
    for each in (ReferenceKernels(), TorchKernels()):
        found = each.pack_linear(weight, None, torch.float32)(x)
        torch.testing.assert_close(found, x @ weight.float().T, atol=0.1, rtol=1e-5)


def test_activations_are_not_narrower_than_weights(kernels: CpuKernels) -> None:
    with pytest.raises(TypeError, match="float16.*bfloat16"):
        kernels.pack_linear(torch.ones(32, 32).half(), None, torch.bfloat16)
    with pytest.raises(ValueError, match="float32.*bfloat16"):
        kernels.embedding(torch.tensor([0]), torch.ones(4, 32), torch.bfloat16)
