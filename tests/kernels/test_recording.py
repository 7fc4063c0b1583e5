"""Programs: which rows their ops work on."""

from __future__ import annotations

import pytest
import torch

from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import PLAIN
from sapwood.kernels.recording import (
    Activate,
    Add,
    Attend,
    CannotRecord,
    Program,
    SelectRows,
    read_by,
    written_by,
)
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.recording_states import Convolve


def attend(x: Buffer, out: Buffer, layer: int) -> Attend:
    return Attend(
        x=x, layer=layer, num_heads=1, num_kv_heads=1, head_dim=x.width, scale=1.0, traits=PLAIN,
        out=out,
    )  # fmt: skip


def convolve(x: Buffer, out: Buffer, layer: int) -> Convolve:
    weight = torch.zeros(out.width, 3)
    return Convolve(x=x, layer=layer, weight=weight, bias=None, gated=True, out=out)


def activate(x: Buffer, out: Buffer) -> Activate:
    return Activate(x=x, activation=Activation.RELU, gated=False, out=out)


def test_rows_are_selected_after_the_last_op_that_looks_at_other_tokens() -> None:
    program = Program(torch.float32)
    x, y, z = program.buffer(24), program.buffer(8), program.buffer(8)
    for op in (activate(x, x), convolve(x, y, 0), activate(y, z)):
        program.add(op)
    before, after = program.split()
    assert [type(op) for op in before] == [Activate, Convolve]
    assert [type(op) for op in after] == [SelectRows, Activate]


def test_rows_are_selected_after_the_last_attention_of_what_is_still_needed() -> None:
    program = Program(torch.float32)
    kept, unused, x, y, z, end = (program.buffer(8) for _ in range(6))
    for op in (
        activate(kept, unused),
        attend(unused, x, 0),
        activate(kept, y),
        attend(x, z, 1),
        Add(x=z, residual=kept),
        activate(kept, end),
    ):
        program.add(op)
    before, after = program.split()
    assert len(before) == 4
    selected = [op for op in after if isinstance(op, SelectRows)]
    # `kept` was never written here, as the first op of a real program would have.
    assert [op.x for op in selected] == [z]
    (new,) = [op.out for op in selected]
    assert after[1].x == new  # type: ignore[union-attr]


def test_a_program_without_attention_selects_no_rows() -> None:
    program = Program(torch.float32)
    program.add(activate(program.buffer(4), program.buffer(4)))
    before, after = program.split()
    assert (len(before), after) == (1, [])


def test_a_residual_is_read_and_written() -> None:
    program = Program(torch.float32)
    x, residual = program.buffer(8), program.buffer(8)
    op = Add(x=x, residual=residual)
    assert (read_by(op), written_by(op)) == ([x, residual], [residual])


def test_sums_over_ranks_are_refused() -> None:
    program = Program(torch.float32)
    program.refuse_sum_over(1)
    with pytest.raises(CannotRecord, match="2 ranks"):
        program.refuse_sum_over(2)
