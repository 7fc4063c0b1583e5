"""Programs: which rows their ops work on, and which buffers may share memory."""

from __future__ import annotations

import random

import pytest
import torch

from sapwood.kernels.activations import Activation
from sapwood.kernels.interface import PLAIN
from sapwood.kernels.recording import (
    Activate,
    Add,
    Attend,
    Buffer,
    CannotRecord,
    Convolve,
    Op,
    Program,
    Scale,
    SelectRows,
    buffers_of,
    plan_memory,
    read_by,
    written_by,
)


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


def random_program(rng: random.Random) -> list[Op]:
    program, ops = Program(torch.float32), list[Op]()
    live = [program.buffer(rng.randint(1, 64))]
    ops.append(activate(live[0], live[0]))
    for _ in range(rng.randint(1, 30)):
        x = rng.choice(live[-4:])
        match rng.randint(0, 2):
            case 0:
                out = program.buffer(rng.randint(1, 64))
                live.append(out)
                ops.append(activate(x, out))
            case 1:
                ops.append(Add(x=x, residual=rng.choice(live[-4:])))
            case _:
                ops.append(Scale(residual=x, factor=2.0))
    return ops


@pytest.mark.parametrize("seed", range(200))
def test_buffers_that_are_needed_at_the_same_time_have_different_places(seed: int) -> None:
    ops = random_program(random.Random(seed))
    widths, places = plan_memory(ops)
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for index, op in enumerate(ops):
        for _, buffer in buffers_of(op):
            first.setdefault(buffer, index)
            last[buffer] = index
    for buffer, place in places.items():
        assert widths[place] >= buffer.width
        for other, where in places.items():
            if other != buffer and where == place:
                assert last[buffer] < first[other] or last[other] < first[buffer]
    assert set(places) == set(first)


def test_a_row_of_layers_needs_the_memory_of_one() -> None:
    program, ops = Program(torch.float32), list[Op]()
    x = program.buffer(8)
    ops.append(activate(x, x))
    for _ in range(50):
        out = program.buffer(8)
        ops.append(activate(x, out))
        x = out
    widths, _ = plan_memory(ops)
    assert widths == [8, 8]


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
