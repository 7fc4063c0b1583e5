"""Checks of linear layers in every format, and of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from sapwood.kernels.activations import Activation
from sapwood.kernels.coded import CodedWeight, quantize_codes
from sapwood.kernels.conformance.checks import Case, Checks, Pair
from sapwood.kernels.interface import Kernels
from sapwood.kernels.packed import PackedExperts
from sapwood.kernels.routing import Routing

CHECKS = Checks()

QUANTIZED_LIMIT = 3e-2
"""The limit for products whose activations are rounded to int8, perhaps a little differently."""


@CHECKS.add("linear")
def _linear(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    weight = case.randn(3 * case.hidden_size, case.hidden_size)
    for bias in (None, case.randn(3 * case.hidden_size)):
        mine, its = (ops.pack_linear(weight, bias) for ops in (kernels, reference))
        for rows in (1, 70):
            x = case.randn(rows, case.hidden_size)
            yield mine(x), its(x)
            yield mine.fp32(x), its.fp32(x)


def _check_quantized(kind: str) -> None:
    @CHECKS.add(f"linear of {kind} weights", limit=QUANTIZED_LIMIT)
    def _quantized(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
        if case.dtype == torch.float16:
            return  # activations of quantised weights are bf16 or fp32
        drawn = torch.randn(2 * case.hidden_size, case.hidden_size, generator=case.generator)
        part = kernels.quantize_weight(drawn.to(case.device), kind)
        mine, its = (
            ops.pack_quantized_linear([part], None, case.dtype) for ops in (kernels, reference)
        )
        for rows in (1, 33):
            x = case.randn(rows, case.hidden_size)
            yield mine(x), its(x)


for _kind in ("int8", "q8_0", "q4_1"):
    _check_quantized(_kind)


@CHECKS.add("linear of codes", limit=QUANTIZED_LIMIT)
def _codes(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    """A scale per output (FP8, int8), per block, and per 16 and 64 inputs."""
    if case.dtype == torch.float16:
        return
    shape = (2 * case.hidden_size, case.hidden_size)
    drawn = torch.randn(shape, generator=case.generator)
    parts = [quantize_codes(drawn, codes) for codes in ("e4m3", "int8")]
    for codes, wanted in (("e4m3", 128), ("fp4", 16), ("nf4", 64), ("int4", 64)):
        group = min(wanted, case.hidden_size)
        width = shape[1] if codes == "e4m3" else shape[1] // 2
        # Codes of E4M3 below 120 are numbers, and none is much larger than the others.
        data = torch.randint(0, 120, (shape[0], width), generator=case.generator).to(torch.uint8)
        scales = torch.rand((shape[0], shape[1] // group), generator=case.generator)
        parts.append(CodedWeight(codes, shape, data, scales, group))
    for part in parts:
        there = [part.to(case.device)]
        mine, its = (
            ops.pack_quantized_linear(there, None, case.dtype) for ops in (kernels, reference)
        )
        for rows in (1, 33):
            x = case.randn(rows, case.hidden_size)
            yield mine(x), its(x)


@CHECKS.add("experts")
def _experts(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    drawn = [
        [case.randn(*shape) * shape[1] ** -0.5 for _ in range(NUM_EXPERTS)]
        for shape in _expert_shapes(case)
    ]

    def packed(ops: Kernels) -> PackedExperts:
        gate_up, down = ([ops.pack_linear(one, None) for one in side] for side in drawn)
        return ops.pack_experts(gate_up, down, Activation.SILU)

    yield from _choose_experts(case, kernels, reference, packed)


@CHECKS.add("experts of codes", limit=QUANTIZED_LIMIT)
def _coded_experts(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    """Of 8 bits, whose activations are not rounded."""
    if case.dtype == torch.float16:
        return
    for codes in ("int8", "e4m3"):
        parts = [
            [
                quantize_codes(torch.randn(shape, generator=case.generator), codes).to(case.device)
                for _ in range(NUM_EXPERTS)
            ]
            for shape in _expert_shapes(case)
        ]

        def packed(ops: Kernels, parts: list[list[CodedWeight]] = parts) -> PackedExperts:
            gate_up, down = (
                [ops.pack_quantized_linear([part], None, case.dtype) for part in side]
                for side in parts
            )
            return ops.pack_experts(gate_up, down, Activation.SILU)

        yield from _choose_experts(case, kernels, reference, packed)


NUM_EXPERTS = 8


def _expert_shapes(case: Case) -> list[tuple[int, int]]:
    return [(2 * case.hidden_size, case.hidden_size), (case.hidden_size, case.hidden_size)]


def _choose_experts(
    case: Case, kernels: Kernels, reference: Kernels, packed: Callable[[Kernels], PackedExperts]
) -> Iterator[Pair]:
    """A token, and more of them than there are experts, routed alike for both."""
    mine, its = packed(kernels), packed(reference)
    rule = Routing(num_chosen=2, renormalise=True)
    for rows in (1, 50):
        logits = case.randn(rows, NUM_EXPERTS, dtype=torch.float32)
        weights, chosen = reference.route(logits, None, rule)
        routed = kernels.route(logits, None, rule)
        yield routed[0], weights
        yield routed[1], chosen
        x = case.randn(rows, case.hidden_size)
        yield mine(x, chosen, weights), its(x, chosen, weights)
