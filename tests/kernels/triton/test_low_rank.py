"""Low-rank additions of many adapters in two kernels, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sapwood.kernels.low_rank import AdapterRows
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.triton.low_rank import tiles_of
from sapwood.kernels.triton.ops import TritonKernels
from tests.kernels.test_low_rank import addition, rows_of

REFERENCE, TRITON = ReferenceKernels(), TritonKernels()
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy

PARTS = {
    0: [(0, 70, 4), (70, 20, 4), (90, 10, 7)],
    1: [(70, 20, 33)],
    3: [(0, 100, 16)],
}
"""By slot: (first output, outputs, rank) of each part; slot 2 adds nothing here, nor does 5."""


def to(rows: AdapterRows, device: torch.device) -> AdapterRows:
    return replace(rows, rows=rows.rows.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_wide", [False, True])
def test_equals_the_reference(device: torch.device, dtype: torch.dtype, is_wide: bool) -> None:
    """Ranks, widths and numbers of rows that fill no tile; rows in pieces; slots that change."""
    torch.manual_seed(3)
    layers = TRITON.low_rank(50, 100), REFERENCE.low_rank(50, 100)
    slot_of_row = [0, 5, 1, -1, 3, 2, *[0] * 20, 3, 1, -1]
    rows = rows_of(slot_of_row)
    out_dtype = torch.float32 if is_wide else dtype
    changes: list[dict[int, list[tuple[int, int, int]] | None]] = [
        {**PARTS},
        {0: None, 1: [(0, 100, 5)]},
        {4: [(90, 10, 1)]},
    ]
    for placed in changes:
        for slot, parts in placed.items():
            added = None if parts is None else addition(50, parts, dtype)
            layers[0].place(slot, None if added is None else added.to(device))
            layers[1].place(slot, added)
        x = torch.randn(len(slot_of_row), 60).to(dtype)[:, 5:55]
        out = torch.randn(len(slot_of_row), 100).to(out_dtype)
        found, expected = out.clone().to(device), out.clone()
        layers[0].add(x.to(device), found, to(rows, device))
        layers[1].add(x, expected, rows)
        error = (found.cpu() - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE[out_dtype]
        bases = [row for row, slot in enumerate(slot_of_row) if slot in (-1, 2, 5)]
        assert torch.equal(found.cpu()[bases], out[bases])


def test_tiles_have_rows_of_one_adapter_and_are_made_once(device: torch.device) -> None:
    rows = to(rows_of([4] * 17 + [1, -1, 1]), device)
    tiles = tiles_of(rows)
    assert tiles.tolist() == [[1, 0, 2], [4, 2, 18], [4, 18, 19]]
    assert tiles_of(rows) is tiles


def test_what_it_would_read_wrongly_is_refused(device: torch.device) -> None:
    layer = TRITON.low_rank(8, 4)
    with pytest.raises(ValueError, match="does not fit"):
        layer.place(0, addition(8, [(0, 5, 1)], torch.float32))
    layer.place(0, addition(8, [(0, 4, 2)], torch.float32).to(device))
    x, out = torch.ones(1, 8, device=device), torch.zeros(1, 4, device=device)
    with pytest.raises(ValueError, match="but x is"):
        layer.add(x.bfloat16(), out.bfloat16(), to(rows_of([0]), device))
    layer.place(1, addition(8, [(0, 4, 2)], torch.bfloat16).to(device))
    with pytest.raises(ValueError, match="additions are"):
        layer.add(x, out, to(rows_of([0]), device))
