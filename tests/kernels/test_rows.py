"""Copies of rows in place, and the soft cap of logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.kernels.cpu.native import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.kv_cache import LARGEST_NUMBER
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels
from tests.tiers import examples

REFERENCE = ReferenceKernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *LARGEST_NUMBER], ids=str)
def test_copies(any_kernels: Kernels, dtype: torch.dtype) -> None:
    content = torch.randint(0, 120, (9, 2, 3, 4)).to(torch.uint8)
    for kernels in (any_kernels, REFERENCE):
        both = content.to(dtype) if dtype.itemsize > 1 else content.view(dtype)
        pages = torch.stack([both, both.clone()], dim=1)  # two layers, side by side
        kernels.copy_rows(pages[:, 1], torch.tensor([3, 3, 8]), torch.tensor([0, 8, 5]))
        want = content[[3, 1, 2, 3, 4, 8, 6, 7, 3]]
        got = [pages[:, layer].clone() for layer in range(2)]
        if dtype.itemsize == 1:
            got = [layer.view(torch.uint8) for layer in got]
        assert torch.equal(got[1].to(torch.uint8), want)
        assert torch.equal(got[0].to(torch.uint8), content)


def test_a_pair_does_not_read_what_another_wrote(any_kernels: Kernels) -> None:
    for kernels in (any_kernels, REFERENCE):
        rows = torch.arange(4.0).view(4, 1)
        # A chain, which row by row would make 0 everywhere, and a swap.
        kernels.copy_rows(rows, torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]))
        assert rows.flatten().tolist() == [0.0, 0.0, 1.0, 2.0]
        kernels.copy_rows(rows, torch.tensor([2, 3]), torch.tensor([3, 2]))
        assert rows.flatten().tolist() == [0.0, 0.0, 2.0, 1.0]


@given(data=st.data(), num_rows=st.integers(1, 12))
@settings(max_examples=examples(200))
def test_any_pairs(data: st.DataObject, num_rows: int) -> None:
    row = st.integers(0, num_rows - 1)
    target = data.draw(st.lists(row, unique=True))
    source = data.draw(st.lists(row, min_size=len(target), max_size=len(target)))
    rows = torch.randn(num_rows, 3)
    want = rows.clone()
    for to, of in zip(target, source, strict=True):
        want[to] = rows[of]
    index = [torch.tensor(side, dtype=torch.int64) for side in (source, target)]
    TorchKernels().copy_rows(rows, *index)
    assert torch.equal(rows, want)


def test_copies_that_do_not_fit(any_kernels: Kernels) -> None:
    rows = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="2 rows to read, but 1 to write"):
        any_kernels.copy_rows(rows, torch.tensor([0, 1]), torch.tensor([2]))
    with pytest.raises((IndexError, RuntimeError)):
        any_kernels.copy_rows(rows, torch.tensor([3]), torch.tensor([0]))


@pytest.mark.parametrize("first", [0, 3], ids=["whole words", "bytes"])
def test_rows_go_from_one_memory_to_another(any_kernels: Kernels, first: int) -> None:
    host = torch.randint(0, 256, (7, 70_016), dtype=torch.uint8)
    device = torch.zeros(5, 80_000, dtype=torch.uint8)
    columns = slice(first, first + 65_600)
    any_kernels.carry_rows(host[:, columns], device[:, columns], [6, 0, 6], [0, 4, 1])
    assert torch.equal(device[[0, 4, 1], columns], host[[6, 0, 6], columns])
    assert not device[2:4].any()
    assert not device[:, columns.stop :].any()
    any_kernels.carry_rows(host, host.clone(), [], [])


def test_rows_that_are_not_there_go_nowhere() -> None:
    host, device = torch.zeros(3, 8, dtype=torch.uint8), torch.zeros(2, 8, dtype=torch.uint8)
    carry_rows = CpuKernels(num_threads=1).carry_rows
    for pairs in (([3], [0]), ([0], [2]), ([-1], [0])):
        with pytest.raises(ValueError, match="has not all of the rows"):
            carry_rows(host, device, *pairs)
    with pytest.raises(ValueError, match="does not fit"):
        carry_rows(host, device[:, 1:], [0], [0])
    with pytest.raises(ValueError, match="are no rows of bytes"):
        carry_rows(host.T, device, [0], [0])


def test_soft_cap(any_kernels: Kernels) -> None:
    logits = torch.randn(3, 1000) * 40
    logits[0, 0], logits[1, 1] = torch.inf, -torch.inf
    want = logits.clone()
    REFERENCE.soft_cap(want, 30.0)
    torch.testing.assert_close(want, 30 * torch.tanh(logits.double() / 30).float())
    any_kernels.soft_cap(logits, 30.0)
    torch.testing.assert_close(logits, want)
