"""Checks of what is computed for each row by itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sapwood.kernels.activations import Activation
from sapwood.kernels.conformance.checks import Case, Checks, Pair
from sapwood.kernels.interface import Kernels

CHECKS = Checks()


@CHECKS.add("embedding")
def _embedding(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    ids, weight = case.randint(case.vocab_size, 33), case.randn(case.vocab_size, case.hidden_size)
    yield kernels.embedding(ids, weight), reference.embedding(ids, weight)


@CHECKS.add("rms_norm")
def _rms_norm(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    weight = case.randn(case.hidden_size)
    for rows in (1, 7, 130):
        x = case.randn(rows, case.hidden_size)
        yield kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)


@CHECKS.add("add_rms_norm")
def _add_rms_norm(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    weight = case.randn(case.hidden_size)
    for rows in (1, 65):
        x, residual = (case.randn(rows, case.hidden_size) for _ in "ab")
        got = kernels.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)
        yield from zip(got, reference.add_rms_norm(x, residual, weight, 1e-5), strict=True)


@CHECKS.add("activate_and_mul")
def _activate_and_mul(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    for activation in Activation:
        for rows in (1, 33):
            x = case.randn(rows, 2 * case.hidden_size)
            got = kernels.activate_and_mul(x.clone(), activation)
            yield got, reference.activate_and_mul(x, activation)


@CHECKS.add("activate")
def _activate(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    x = case.randn(33, case.hidden_size)
    for activation in Activation:
        yield kernels.activate(x.clone(), activation), reference.activate(x, activation)
    yield kernels.xielu(x.clone(), 0.7, 0.3), reference.xielu(x, 0.7, 0.3)
    own = case.randn(33, case.hidden_size)
    expected = own.clone()
    kernels.add_to(x, own)
    reference.add_to(x, expected)
    yield own, expected


@CHECKS.add("layer_norm")
def _layer_norm(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    x, weight, bias = (
        case.randn(*shape) for shape in ((7, case.hidden_size), *[(case.hidden_size,)] * 2)
    )
    for scale, shift in ((weight, bias), (weight, None), (None, None)):
        got, wanted = (
            ops.layer_norm(x.clone(), scale, shift, 1e-5) for ops in (kernels, reference)
        )
        yield got, wanted


@CHECKS.add("gates")
def _gates(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    x, columns = case.randn(9, case.hidden_size), case.randn(9, case.hidden_size)
    for gate, name in ((case.randn(9, 1), "gate_rows"), (columns, "gate_columns")):
        mine, its = x.clone(), x.clone()
        getattr(kernels, name)(mine, gate)
        getattr(reference, name)(its, gate)
        yield mine, its


@CHECKS.add("carry_rows")
def _carry_rows(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    """Rows of some columns, of other memory."""
    width = 70_000
    source = case.randint(256, 6, width + 8).to(torch.uint8)[:, 3 : width + 3]
    mine = torch.zeros(9, width + 5, dtype=torch.uint8, device=case.device)
    its = mine.clone()
    for got, one in ((mine, kernels), (its, reference)):
        one.carry_rows(source, got[:, 2 : width + 2], [4, 0, 5, 0], [8, 1, 0, 3])
    yield mine, its


@CHECKS.add("copy_rows")
def _copy_rows(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    """Rows that are read for one pair and written for another."""
    mine = case.randn(12, 3, case.head_dim)
    its = mine.clone()
    source = torch.tensor([0, 1, 2, 3], device=case.device)
    target = torch.tensor([1, 2, 7, 0], device=case.device)
    kernels.copy_rows(mine, source, target)
    reference.copy_rows(its, source, target)
    yield mine, its
