"""What goes through the layers of a model, where that is not the hidden states alone."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sapwood.kernels.recording import CannotRecord, Multiply, Program
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.linear import Linear
from sapwood.layers.targets import Target


class Streams(Protocol):
    """The computation before the first layer and after the last one, with the last norm.

    Layers of such a model take and give tensors of `opened`'s shape."""

    def opened(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """Embeddings [T, size of the embedding] -> what the first layer takes [T, width]"""
        ...

    def closed(self, x: Tensor) -> Tensor:
        """What the last layer gives [T, width] -> the normed inputs [T, size] of the output
        layer"""
        ...

    def record_opened(self, program: Program, x: Buffer) -> Buffer:
        """Add `opened` to a recorded step. Raises CannotRecord if programs have no ops for it, and
        RuntimeError before `pack`."""
        raise CannotRecord("a recorded step has no such streams beside the hidden states")

    def record_closed(self, program: Program, x: Buffer) -> Buffer:
        """Add `closed` to a recorded step that begins with `record_opened`."""
        raise CannotRecord("a recorded step has no such streams beside the hidden states")

    def targets(self) -> dict[str, Target]:
        """By whole names."""
        ...

    def pack(self) -> None: ...


class WholeLinear:
    """A linear layer without a bias, which every rank has whole."""

    def __init__(self, build: Build, in_size: int, out_size: int) -> None:
        self._shape = (out_size, in_size)
        self._linear = Linear(build, in_size, (out_size,), bias=False)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]"""
        return self._linear(x)

    def targets(self) -> dict[str, Target]:
        linear = self._linear
        blocks = (lambda rows: linear.put_blocks(0, rows)) if linear.takes_blocks else None
        put = lambda rows: linear.put(0, rows)  # noqa: E731
        return {"weight": Target(self._shape, put, blocks, is_beside=True)}

    def pack(self) -> None:
        self._linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """Add the product of x to a recorded step; RuntimeError before `pack`."""
        out = program.buffer(self._shape[0])
        program.add(Multiply(x=x, layer=self._linear.packed, out=out))
        return out
