"""Low-rank additions of every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.low_rank import AdapterRows, LowRank
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels
from tests.tiers import examples

IMPLEMENTATIONS = ["torch", *CpuKernels.usable_isas()]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def kernels_of(name: str) -> Kernels:
    return TorchKernels() if name == "torch" else CpuKernels(isa=name, num_threads=2)


def addition(in_size: int, parts: list[tuple[int, int, int]], dtype: torch.dtype) -> LowRank:
    """parts: (first output, outputs, rank)"""
    return LowRank.of(
        [
            (first, torch.randn(rank, in_size) * in_size**-0.5, torch.randn(outputs, rank))
            for first, outputs, rank in parts
        ],
        dtype,
    )


def rows_of(slot_of_row: list[int]) -> AdapterRows:
    slots = tuple(sorted({slot for slot in slot_of_row if slot >= 0}))
    groups = [[row for row, own in enumerate(slot_of_row) if own == slot] for slot in slots]
    starts = [0]
    for group in groups:
        starts.append(starts[-1] + len(group))
    rows = torch.tensor([row for group in groups for row in group], dtype=torch.int64)
    return AdapterRows(slots=slots, starts=tuple(starts), rows=rows)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=examples(150))
@given(data=st.data())
def test_equals_the_reference(name: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    in_size = data.draw(st.sampled_from([1, 6, 31, 64, 150]))
    widths = data.draw(st.lists(st.sampled_from([1, 5, 32, 67, 300]), min_size=1, max_size=3))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    starts = [sum(widths[:index]) for index in range(len(widths))]
    places = list(zip(starts, widths, strict=True))
    kernels, reference = kernels_of(name), ReferenceKernels()
    layers = [each.low_rank(in_size, sum(widths)) for each in (kernels, reference)]
    for slot in range(3):
        chosen = data.draw(st.lists(st.sampled_from(places), max_size=len(places), unique=True))
        if not chosen:
            continue
        ranks = [data.draw(st.sampled_from([1, 3, 4, 16, 33])) for _ in chosen]
        added = addition(
            in_size, [(*place, rank) for place, rank in zip(chosen, ranks, strict=True)], dtype
        )
        for layer in layers:
            layer.place(slot, added)
    slot_of_row = data.draw(st.lists(st.integers(-1, 3), min_size=1, max_size=90))
    x = torch.randn(len(slot_of_row), in_size).to(dtype)
    wide = data.draw(st.booleans())
    out = torch.randn(len(slot_of_row), sum(widths)).to(torch.float32 if wide else dtype)
    expected, found = out.clone(), out.clone()
    rows = rows_of(slot_of_row)
    layers[0].add(x, found, rows)
    layers[1].add(x, expected, rows)
    scale = expected.abs().max().clamp(min=1.0)
    tolerance = (
        TOLERANCE[torch.float32] if wide and dtype is torch.float32 else TOLERANCE[out.dtype]
    )
    assert ((found - expected).abs().max() / scale) <= tolerance
    untouched = [row for row, slot in enumerate(slot_of_row) if slot in (-1, 3)]
    assert torch.equal(found[untouched], out[untouched])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_slot_can_be_emptied_and_given_to_another(name: str) -> None:
    layer = kernels_of(name).low_rank(8, 4)
    x, rows = torch.ones(2, 8), rows_of([0, 0])
    layer.place(0, addition(8, [(0, 4, 2)], torch.float32))
    first = torch.zeros(2, 4)
    layer.add(x, first, rows)
    layer.place(0, None)
    layer.place(0, None)
    out = torch.zeros(2, 4)
    layer.add(x, out, rows)
    assert first.abs().sum() > 0
    assert out.abs().sum() == 0


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("parts", [[(1, 4, 2)], [(0, 5, 1)]])
def test_an_addition_that_does_not_fit_is_refused(
    name: str, parts: list[tuple[int, int, int]]
) -> None:
    kernels = ReferenceKernels() if name == "reference" else kernels_of(name)
    layer = kernels.low_rank(8, 4)
    with pytest.raises(ValueError, match="does not fit"):
        layer.place(0, addition(8, parts, torch.float32))
    with pytest.raises(ValueError, match="does not fit"):
        layer.place(0, addition(7, [(0, 4, 1)], torch.float32))


def test_native_refuses_what_it_would_read_wrongly() -> None:
    layer = CpuKernels(num_threads=1).low_rank(8, 4)
    layer.place(0, addition(8, [(0, 4, 2)], torch.float32))
    x, out = torch.ones(2, 8), torch.zeros(2, 4)
    with pytest.raises(IndexError, match="a row with an adapter"):
        layer.add(x, out, AdapterRows(slots=(0,), starts=(0, 1), rows=torch.tensor([2])))
    with pytest.raises(ValueError, match="do not fit their places"):
        layer.add(x, out, AdapterRows(slots=(0,), starts=(0, 2), rows=torch.tensor([1])))
    with pytest.raises(ValueError, match="but x is"):
        layer.add(x.bfloat16(), out.bfloat16(), rows_of([0, -1]))
    with pytest.raises(ValueError, match="do not fit"):
        layer.add(x, torch.zeros(2, 5), rows_of([0, -1]))
