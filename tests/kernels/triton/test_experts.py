"""The grouped products of experts against ReferenceKernels, and under a capture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.coded import CodedWeight
from sapwood.kernels.interface import Kernels
from sapwood.kernels.packed import PackedExperts
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.reference.quantized import quantize
from sapwood.kernels.routing import Routing
from sapwood.kernels.triton.experts import GroupedExperts, SortedPairs
from sapwood.kernels.triton.ops import TritonKernels
from tests.executor.recording_capture import RecordingCapture
from tests.kernels.test_coded import random_weight
from tests.kernels.test_experts import QUANTISED
from tests.tiers import sweep

REFERENCE, TRITON = ReferenceKernels(), TritonKernels()
HIDDEN, INNER, NUM_EXPERTS, TOP_K = 64, 96, 6, 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}
"""Of the largest entry. The interpreter cuts bfloat16 off where the GPU rounds: gates, too."""
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy
Pack = Callable[[Kernels, torch.device], PackedExperts]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(6)


def routed(num_tokens: int) -> tuple[Tensor, Tensor]:
    """Nobody chooses the second expert, and nearly everybody the first one."""
    logits = torch.randn(num_tokens, NUM_EXPERTS) + torch.tensor([3.0, -99, 0, 0, 0, 0])
    return REFERENCE.route(logits, None, Routing(num_chosen=TOP_K, renormalise=True))


def compare(pack: Pack, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(num_tokens, 2 * HIDDEN).to(dtype)[:, :HIDDEN]
    weights, chosen = routed(num_tokens)
    want = pack(REFERENCE, torch.device("cpu"))(x, chosen, weights)
    packed = pack(TRITON, device)
    assert isinstance(packed, GroupedExperts)
    got = packed(x.to(device), chosen.to(device), weights.to(device))
    assert got.dtype == want.dtype
    error = (got.float().cpu() - want.float()).abs().max()
    assert error <= TOLERANCE[dtype] * want.float().abs().max()


@sweep(dtype=list(TOLERANCE), num_tokens=[1, 5, 70], has_bias=[False, True])
def test_dense(device: torch.device, dtype: torch.dtype, num_tokens: int, has_bias: bool) -> None:
    shapes = (2 * INNER, HIDDEN), (HIDDEN, INNER)
    drawn = [
        [torch.randn(shape) * shape[1] ** -0.5 for _ in range(NUM_EXPERTS)] for shape in shapes
    ]
    biases = [torch.randn(shape[0]) if has_bias else None for shape in shapes]

    def pack(kernels: Kernels, at: torch.device) -> PackedExperts:
        sides = [
            [
                kernels.pack_linear(one.to(at, dtype), None if bias is None else bias.to(at, dtype))
                for one in side
            ]
            for side, bias in zip(drawn, biases, strict=True)
        ]
        return kernels.pack_experts(*sides, Activation.SILU, limit=2.0 if has_bias else None)

    compare(pack, num_tokens, dtype, device)


def exact(weight: Tensor) -> CodedWeight:
    return random_weight("e4m3", (*weight.shape, 32))


@sweep(
    kind=[*QUANTISED, "coded e4m3", "fp8"],
    num_tokens=[1, 40],
    dtype=[torch.float32, torch.bfloat16],
)
def test_coded(device: torch.device, kind: str, num_tokens: int, dtype: torch.dtype) -> None:
    """int8 and FP8 whose activations a linear layer rounds: here it is not rounded, and the
    reference computes with the decoded numbers."""
    shapes = (2 * INNER, HIDDEN), (HIDDEN, INNER)

    def made(weight: Tensor) -> object:
        if kind == "fp8":
            return replace(exact(weight), rounds_inputs=True)
        return exact(weight) if kind == "coded e4m3" else QUANTISED[kind](weight)

    drawn = [
        [made(torch.randn(shape) * shape[1] ** -0.5) for _ in range(NUM_EXPERTS)]
        for shape in shapes
    ]

    def pack(kernels: Kernels, at: torch.device) -> PackedExperts:
        if kernels is REFERENCE:
            sides = [
                [kernels.pack_linear(one.dequantized(dtype), None) for one in side]
                for side in drawn
            ]
        else:
            sides = [
                [kernels.pack_quantized_linear([one.to(at)], None, dtype) for one in side]
                for side in drawn
            ]
        return kernels.pack_experts(*sides, Activation.SILU)

    compare(pack, num_tokens, dtype, device)


def test_pairs_are_sorted_into_blocks_of_one_expert() -> None:
    chosen = torch.tensor([[3, 0], [3, 1], [0, 3]])
    order = SortedPairs.of(chosen, 5, 2)
    # As many blocks as any choice of three tokens could need.
    assert order.experts.tolist() == [0, 1, 3, 3, 5, 5, 5, 5]
    assert order.pairs.tolist() == [1, 4, 3, 6, 0, 2, 5, *[6] * 9]
    everybody = SortedPairs.of(torch.zeros(9, 1, dtype=torch.int64), 2, 4)
    assert everybody.experts.tolist() == [0, 0, 0, 2]
    each = SortedPairs.of(torch.arange(5)[:, None], 5, 16)
    assert each.experts.tolist() == [0, 1, 2, 3, 4]


def test_experts_that_are_stored_differently_are_computed_one_by_one(device: torch.device) -> None:
    weights = [torch.randn(2 * INNER, HIDDEN), torch.randn(HIDDEN, INNER)]
    parts = [[quantize(weight, kind).to(device) for kind in ("q8_0", "q4_1")] for weight in weights]
    sides = [
        [TRITON.pack_quantized_linear([p], None, torch.float32) for p in side] for side in parts
    ]
    packed = TRITON.pack_experts(*sides, Activation.SILU)
    assert not isinstance(packed, GroupedExperts)
    x = torch.randn(3, HIDDEN)
    chosen, shares = torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5)
    reference = [
        [REFERENCE.pack_linear(part.dequantized(torch.float32).cpu(), None) for part in side]
        for side in parts
    ]
    want = REFERENCE.pack_experts(*reference, Activation.SILU)(x, chosen, shares)
    got = packed(x.to(device), chosen.to(device), shares.to(device))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-3)


def test_no_tokens(device: torch.device) -> None:
    layers = [
        [TRITON.pack_linear(torch.randn(shape, device=device), None)] * 2
        for shape in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    ]
    nobody = torch.zeros(0, TOP_K, dtype=torch.int64, device=device)
    x = torch.zeros(0, HIDDEN, device=device)
    assert TRITON.pack_experts(*layers, Activation.SILU)(x, nobody, nobody.float()).shape == x.shape


def test_the_host_looks_at_no_result(device: torch.device) -> None:
    """So that a step with experts can be captured."""
    layers = [
        [TRITON.pack_linear(torch.randn(shape, device=device), None)] * NUM_EXPERTS
        for shape in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    ]
    experts = TRITON.pack_experts(*layers, Activation.SILU)
    router = torch.randn(NUM_EXPERTS, HIDDEN, device=device)
    x, capture = torch.randn(4, HIDDEN, device=device), RecordingCapture()
    capture.begin()
    try:
        weights, chosen = TRITON.route(x @ router.T, None, Routing(num_chosen=TOP_K))
        experts(x, chosen, weights)
    finally:
        recording = capture.end()
    assert recording.notes
