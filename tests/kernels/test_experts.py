"""Computing experts: every implementation against the reference, and that
against transformers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.coded import quantize_codes
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.reference.quantized import quantize
from sapwood.kernels.routing import Routing
from tests.kernels.test_coded import random_weight

HIDDEN, INNER, NUM_EXPERTS, TOP_K = 64, 96, 6, 2
REFERENCE = ReferenceKernels()
MIXTRAL = Routing(num_chosen=TOP_K, renormalise=True)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(9)


def weights_of(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    gate_up = [torch.randn(2 * INNER, HIDDEN) * HIDDEN**-0.5 for _ in range(NUM_EXPERTS)]
    down = [torch.randn(HIDDEN, INNER) * INNER**-0.5 for _ in range(NUM_EXPERTS)]
    return [weight.to(dtype) for weight in gate_up], [weight.to(dtype) for weight in down]


def close(found: Tensor, want: Tensor, tolerance: float) -> None:
    assert found.dtype == want.dtype
    assert (found.float() - want.float()).abs().max() <= tolerance * want.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU_TANH])
def test_experts(
    any_kernels: Kernels, dtype: torch.dtype, num_tokens: int, activation: Activation
) -> None:
    x = torch.randn(num_tokens, HIDDEN).to(dtype)
    logits = torch.randn(num_tokens, NUM_EXPERTS)
    weights, chosen = REFERENCE.route(logits, None, MIXTRAL)
    gate_up, down = weights_of(dtype)
    results = []
    for kernels in (any_kernels, REFERENCE):
        packed = [
            [kernels.pack_linear(weight, None) for weight in side] for side in (gate_up, down)
        ]
        results.append(kernels.pack_experts(*packed, activation)(x, chosen, weights))
    close(*results, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 9, 330])
@pytest.mark.parametrize("kind", [None, "int8", "q4_1", "coded int4"])
def test_work_that_is_cut(
    any_kernels: Kernels, kind: str | None, num_tokens: int, dtype: torch.dtype
) -> None:
    """Layers and tokens are large enough for tasks with a part of an expert's outputs; with 330
    tokens one expert has more of them than a task takes, and another one has none."""
    found = cut_work(any_kernels, kind, num_tokens, dtype)
    tolerance = TOLERANCE[dtype] if kind is None else 3e-2
    close(found, cut_work_by_reference(kind, num_tokens, dtype), tolerance)


def cut_work(kernels: Kernels, kind: str | None, num_tokens: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(4)
    hidden, inner = 512, 160
    shapes = [(2 * inner, hidden)] * NUM_EXPERTS, [(hidden, inner)] * NUM_EXPERTS
    drawn = [[torch.randn(shape) * shape[1] ** -0.5 for shape in side] for side in shapes]
    x = torch.randn(num_tokens, hidden).to(dtype)
    logits = torch.randn(num_tokens, NUM_EXPERTS) + torch.tensor([9.0, -99, 0, 0, 0, 0])
    weights, chosen = REFERENCE.route(logits, None, MIXTRAL)
    packed = [
        [
            kernels.pack_linear(one.to(dtype), None)
            if kind is None
            else kernels.pack_quantized_linear([QUANTISED[kind](one)], None, dtype)
            for one in side
        ]
        for side in drawn
    ]
    return kernels.pack_experts(*packed, Activation.SILU)(x, chosen, weights)


@functools.cache
def cut_work_by_reference(kind: str | None, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """Takes seconds for some kinds, and is the same whatever kernels are tested."""
    return cut_work(REFERENCE, kind, num_tokens, dtype)


def test_as_in_mixtral(any_kernels: Kernels) -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
    )  # fmt: skip
    block = MixtralSparseMoeBlock(config).eval()
    parameters = dict(block.named_parameters())
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(11, HIDDEN)
    want = block(x[None])
    want = (want[0] if isinstance(want, tuple) else want)[0]
    logits = x @ parameters["gate.weight"].T
    weights, chosen = any_kernels.route(logits.detach(), None, MIXTRAL)
    gate_up, down = (
        [any_kernels.pack_linear(weight.detach(), None) for weight in parameters[name]]
        for name in ("experts.gate_up_proj", "experts.down_proj")
    )
    found = any_kernels.pack_experts(gate_up, down, Activation.SILU)(x, chosen, weights)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


QUANTISED = {
    "int8": lambda weight: quantize(weight, "int8"),
    "q8_0": lambda weight: quantize(weight, "q8_0"),
    "q4_1": lambda weight: quantize(weight, "q4_1"),
    "coded int8": lambda weight: quantize_codes(weight, "int8", 32),
    "coded int4": lambda weight: random_weight("int4", (*weight.shape, 32), shifts=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_experts(
    any_kernels: Kernels, kind: str, num_tokens: int, dtype: torch.dtype
) -> None:
    """In any format that the kernels pack; those that round x are within its rounding."""
    x = torch.randn(num_tokens, HIDDEN).to(dtype)
    rule = Routing(num_chosen=TOP_K)
    weights, chosen = REFERENCE.route(torch.randn(num_tokens, NUM_EXPERTS), None, rule)
    parts = [[QUANTISED[kind](one) for one in side] for side in weights_of(torch.float32)]

    def computed(kernels: Kernels) -> Tensor:
        packed = [
            [kernels.pack_quantized_linear([one], None, dtype) for one in side] for side in parts
        ]
        return kernels.pack_experts(*packed, Activation.SILU)(x, chosen, weights)

    close(computed(any_kernels), computed(REFERENCE), 3e-2)


def test_a_tokens_result_does_not_depend_on_the_others(any_kernels: Kernels) -> None:
    """Few rows for each expert, so that all products are of the same kind."""
    packed = [
        [any_kernels.pack_linear(w, None) for w in side] for side in weights_of(torch.float32)
    ]
    experts = any_kernels.pack_experts(*packed, Activation.SILU)
    x = torch.randn(5, HIDDEN)
    weights, chosen = REFERENCE.route(torch.randn(5, NUM_EXPERTS), None, MIXTRAL)
    together = experts(x, chosen, weights)
    for token in range(5):
        own = slice(token, token + 1)
        alone = experts(x[own], chosen[own], weights[own])
        torch.testing.assert_close(alone, together[own], rtol=1e-5, atol=1e-6)


def test_experts_with_biases(any_kernels: Kernels) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        gate_up, down = weights_of(dtype)
        biases = (torch.randn(2 * INNER).to(dtype), torch.randn(HIDDEN).to(dtype))
        x = torch.randn(7, HIDDEN).to(dtype)
        weights, chosen = REFERENCE.route(torch.randn(7, NUM_EXPERTS), None, MIXTRAL)
        results = [
            kernels.pack_experts(
                [kernels.pack_linear(weight, biases[0]) for weight in gate_up],
                [kernels.pack_linear(weight, biases[1]) for weight in down],
                Activation.SILU,
            )(x, chosen, weights)
            for kernels in (any_kernels, REFERENCE)
        ]
        close(*results, TOLERANCE[dtype])


def test_no_tokens_and_experts_that_are_not_there(any_kernels: Kernels) -> None:
    packed = [
        [any_kernels.pack_linear(w, None) for w in side] for side in weights_of(torch.float32)
    ]
    experts = any_kernels.pack_experts(*packed, Activation.SILU)
    nobody = torch.zeros(0, TOP_K, dtype=torch.int64)
    assert experts(torch.zeros(0, HIDDEN), nobody, nobody.float()).shape == (0, HIDDEN)
    chosen = torch.tensor([[0, NUM_EXPERTS]])
    with pytest.raises(ValueError, match="expert 6 is chosen, but there are 6 experts"):
        experts(torch.zeros(1, HIDDEN), chosen, chosen.float())
    with pytest.raises(ValueError, match="6 gates and 5 outputs"):
        any_kernels.pack_experts(packed[0], packed[1][:5], Activation.SILU)


def test_gated_rows(any_kernels: Kernels) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, gate = torch.randn(9, 33).to(dtype), torch.randn(9, 1).to(dtype) * 3
        want = (x.double() * torch.sigmoid(gate.double())).to(dtype)
        any_kernels.gate_rows(x, gate)
        close(x, want, 1e-6 if dtype == torch.float32 else 8e-3)
