"""Activations and LayerNorm: every implementation against the reference, and that against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from tests.kernels.conftest import IMPLEMENTATIONS, make_kernels
from tests.tiers import sweep

REFERENCE = ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCE[expected.dtype]
    # Near zero a gate is a difference of two numbers that are nearly the same, times a factor.
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=max(min(tolerance, 1e-4), 2e-5)
    )


def test_the_reference_computes_what_transformers_has() -> None:
    from transformers.activations import ACT2FN

    x = torch.randn(7, 33) * 4
    names = {
        Activation.SILU: "silu", Activation.GELU: "gelu", Activation.GELU_TANH: "gelu_pytorch_tanh",
        Activation.RELU: "relu", Activation.RELU2: "relu2", Activation.QUICK_GELU: "quick_gelu",
    }  # fmt: skip
    assert set(names) == set(Activation)
    for activation, name in names.items():
        torch.testing.assert_close(REFERENCE.activate(x, activation), ACT2FN[name](x))


@sweep(
    name=IMPLEMENTATIONS,
    activation=list(Activation),
    dtype=DTYPES,
    shape=[(1, 3072), (5, 34), (64, 1026), (3, 2)],
)
def test_activations(
    name: str, activation: Activation, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    kernels = make_kernels(name)
    x = (torch.randn(shape) * 4).to(dtype)
    x[0, 0], x[0, 1] = -200.0, 200.0  # exp must neither overflow nor give NaN
    assert_close(kernels.activate(x, activation), REFERENCE.activate(x, activation))
    want = REFERENCE.activate_and_mul(x, activation)
    assert_close(kernels.activate_and_mul(x, activation), want)
    apart = x[:, ::2]
    assert_close(kernels.activate(apart, activation), REFERENCE.activate(apart, activation))


@pytest.mark.parametrize("activation", list(Activation))
def test_every_size_of_number(any_kernels: Kernels, activation: Activation) -> None:
    x = torch.linspace(-30, 30, 60_001).view(1, -1)
    found = any_kernels.activate(x, activation)
    torch.testing.assert_close(found, REFERENCE.activate(x, activation), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("activation", list(Activation))
def test_nan_stays(any_kernels: Kernels, activation: Activation) -> None:
    x = torch.full((1, 38), torch.nan)
    assert any_kernels.activate(x, activation).isnan().all()
    assert any_kernels.activate_and_mul(x, activation).isnan().all()


def test_a_row_does_not_depend_on_where_it_is_cut() -> None:
    """Whole vectors and what is left over of a row give the same bits."""
    x = torch.randn(1, 64) * 4
    for isa in CpuKernels.usable_isas():
        kernels = CpuKernels(isa=isa, num_threads=1)
        for activation in Activation:
            whole = kernels.activate(x, activation)
            parts = [kernels.activate(x[:, i : i + 1], activation) for i in range(64)]
            assert torch.equal(whole, torch.cat(parts, dim=1))


def test_an_odd_number_of_columns_has_no_halves() -> None:
    for isa in CpuKernels.usable_isas()[-1:]:
        with pytest.raises(ValueError, match="even number of columns"):
            CpuKernels(isa=isa).activate_and_mul(torch.randn(2, 33), Activation.GELU)


@sweep(
    name=IMPLEMENTATIONS,
    dtype=DTYPES,
    shape=[(1, 576), (3, 100), (1, 5), (37, 2048), (0, 16), (200, 576)],
    given=[(True, True), (True, False), (False, False), (False, True)],
)
def test_layer_norm(
    name: str, dtype: torch.dtype, shape: tuple[int, int], given: tuple[bool, bool]
) -> None:
    x = (torch.randn(shape) * 3 + 20).to(dtype)
    weight, bias = (torch.randn(shape[1], dtype=dtype) if is_given else None for is_given in given)
    found = make_kernels(name).layer_norm(x, weight, bias, 1e-5)
    expected = REFERENCE.layer_norm(x, weight, bias, 1e-5)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        own = F.layer_norm(x, shape[1:], weight, bias, 1e-5)
        torch.testing.assert_close(expected, own, rtol=1e-5, atol=1e-5)


@sweep(
    name=IMPLEMENTATIONS,
    dtype=DTYPES,
    shape=[(7, 2, 64), (300, 3, 128), (1, 1, 6), (0, 2, 16)],
    given=[(True, True), (True, False), (False, True), (False, False)],
)
def test_norm_rotate_heads(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int], given: tuple[bool, bool]
) -> None:
    tokens, heads, size = shape
    # Columns of a wider product, as queries and keys are.
    x = torch.randn(tokens, 3 * heads * size).to(dtype)[:, heads * size : 2 * heads * size]
    norm = torch.randn(size).to(dtype) if given[0] else None
    angles = torch.randn(tokens, size // 2)
    rotations = torch.polar(torch.ones_like(angles), angles) if given[1] else None
    found, expected = (torch.empty(shape, dtype=dtype) for _ in range(2))
    make_kernels(name).norm_rotate_heads(x, norm, 1e-6, rotations, found)
    REFERENCE.norm_rotate_heads(x, norm, 1e-6, rotations, expected)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_norm_rotate_heads_refuses_what_does_not_fit() -> None:
    x, out = torch.randn(2, 32), torch.empty(2, 2, 16)
    kernels = CpuKernels(isa=CpuKernels.usable_isas()[-1])
    with pytest.raises(ValueError, match="does not fit"):
        kernels.norm_rotate_heads(x[:, :16], None, 1e-6, None, out)
    with pytest.raises(ValueError, match=r"rotations .* do not fit"):
        kernels.norm_rotate_heads(x, None, 1e-6, torch.zeros(2, 4, dtype=torch.complex64), out)
    with pytest.raises(ValueError, match="norm"):
        kernels.norm_rotate_heads(x, torch.ones(15), 1e-6, None, out)


def test_layer_norm_refuses_a_weight_of_another_size() -> None:
    for isa in CpuKernels.usable_isas()[-1:]:
        with pytest.raises(ValueError, match=r"weight \[31\] float32 must be \[32\]"):
            CpuKernels(isa=isa).layer_norm(torch.randn(2, 32), torch.ones(31), None, 1e-5)


@sweep(name=IMPLEMENTATIONS, dtype=DTYPES, shape=[(1, 3072), (5, 34), (3, 1)])
def test_xielu(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape) * 4).to(dtype)
    x[0, 0] = -200.0
    x[-1, -1] = 0.0
    expected = REFERENCE.xielu(x, 0.8, 1.3)
    assert_close(make_kernels(name).xielu(x, 0.8, 1.3), expected)


def test_the_references_xielu_is_that_of_transformers() -> None:
    from transformers.activations import XIELUActivation

    x = torch.randn(9, 40) * 3
    theirs = XIELUActivation(alpha_p_init=0.6, alpha_n_init=0.9, dtype=torch.float32)
    above, below = (F.softplus(number).item() for number in (theirs.alpha_p, theirs.alpha_n))
    torch.testing.assert_close(REFERENCE.xielu(x, above, 0.5 + below), theirs(x))
