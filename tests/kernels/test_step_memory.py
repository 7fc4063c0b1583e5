"""Which buffers of a program may share memory."""

from __future__ import annotations

import random

import pytest
import torch

from sapwood.kernels.activations import Activation
from sapwood.kernels.recording import Activate, Add, Op, Program, Scale, buffers_of
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.step_memory import plan_memory


def activate(x: Buffer, out: Buffer) -> Activate:
    return Activate(x=x, activation=Activation.RELU, gated=False, out=out)


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
