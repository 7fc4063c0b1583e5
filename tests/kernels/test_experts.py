"""Choosing experts and computing them: every implementation against the reference, and that
against transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.coded import quantize_codes
from sapwood.kernels.interface import Kernels, PackedLinear
from sapwood.kernels.reference import ReferenceKernels

HIDDEN, INNER, NUM_EXPERTS, TOP_K = 64, 96, 6, 2
REFERENCE = ReferenceKernels()
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
    weights, chosen = REFERENCE.top_k_softmax(logits, TOP_K, renormalise=True)
    gate_up, down = weights_of(dtype)
    results = []
    for kernels in (any_kernels, REFERENCE):
        packed = [
            [kernels.pack_linear(weight, None) for weight in side] for side in (gate_up, down)
        ]
        results.append(kernels.experts(x, chosen, weights, *packed, activation))
    close(*results, TOLERANCE[dtype])


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
    weights, chosen = any_kernels.top_k_softmax(logits, TOP_K, renormalise=True)
    gate_up, down = (
        [any_kernels.pack_linear(weight.detach(), None) for weight in parameters[name]]
        for name in ("experts.gate_up_proj", "experts.down_proj")
    )
    found = any_kernels.experts(x, chosen, weights, gate_up, down, Activation.SILU)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_quantised_experts(any_kernels: Kernels) -> None:
    """In any format that the kernels pack; here codes of 8 bits."""
    x = torch.randn(9, HIDDEN)
    weights, chosen = REFERENCE.top_k_softmax(torch.randn(9, NUM_EXPERTS), TOP_K, renormalise=False)
    coded = [
        [quantize_codes(weight, "int8", 32) for weight in side]
        for side in weights_of(torch.float32)
    ]

    def computed(kernels: Kernels) -> Tensor:
        def pack(one) -> PackedLinear:  # type: ignore[no-untyped-def]
            return kernels.pack_quantized_linear([one], None, torch.float32)

        gate_up, down = ([pack(one) for one in side] for side in coded)
        return kernels.experts(x, chosen, weights, gate_up, down, Activation.SILU)

    close(computed(any_kernels), computed(REFERENCE), 1e-4)


def test_no_tokens_and_experts_that_are_not_there(any_kernels: Kernels) -> None:
    packed = [
        [any_kernels.pack_linear(w, None) for w in side] for side in weights_of(torch.float32)
    ]
    nobody = torch.zeros(0, TOP_K, dtype=torch.int64)
    x = torch.zeros(0, HIDDEN)
    out = any_kernels.experts(x, nobody, nobody.float(), *packed, Activation.SILU)
    assert out.shape == (0, HIDDEN)
    chosen = torch.tensor([[0, NUM_EXPERTS]])
    with pytest.raises(ValueError, match="expert 6 is chosen, but there are 6 gates"):
        any_kernels.experts(
            torch.zeros(1, HIDDEN), chosen, chosen.float(), *packed, Activation.SILU
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_top_k_softmax(any_kernels: Kernels, dtype: torch.dtype, renormalise: bool, k: int) -> None:
    logits = torch.randint(-3, 3, (50, 7)).to(dtype)  # many equal ones
    weights, ids = any_kernels.top_k_softmax(logits, k, renormalise=renormalise)
    want, want_ids = REFERENCE.top_k_softmax(logits, k, renormalise=renormalise)
    assert torch.equal(ids, want_ids)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, want)
    if renormalise:  # then it is the softmax of the chosen logits alone
        alone = logits.gather(1, ids).float().softmax(dim=-1)
        torch.testing.assert_close(weights, alone)


def test_of_equal_experts_the_first_are_chosen(any_kernels: Kernels) -> None:
    _, ids = any_kernels.top_k_softmax(torch.ones(3, 40), 4, renormalise=True)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    for k in (0, 41):
        with pytest.raises(ValueError, match=f"k is {k}, but there are 40 experts"):
            any_kernels.top_k_softmax(torch.ones(3, 40), k, renormalise=True)
