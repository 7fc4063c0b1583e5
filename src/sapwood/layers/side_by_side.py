"""Several mixers of the same inputs, whose results are added up."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from torch import Tensor

from sapwood.kernels.recording import Add, Program, Scale
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.layer import Mixer
from sapwood.layers.targets import Target, prefixed


@dataclass(frozen=True, slots=True)
class NamedMixer:
    """A mixer, its name in the checkpoint, and the factor of its result."""

    name: str
    mixer: Mixer
    scale: float = 1.0


class SideBySide:
    """The sum of scale * mixer(x)."""

    def __init__(self, mixers: Sequence[NamedMixer]) -> None:
        """`mixers`: at least one"""
        self._mixers = tuple(mixers)

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        total = None
        for part in self._mixers:
            total = _added(total, part.mixer(x, batch), part.scale)
        assert total is not None
        return total

    def steps(self, x: Tensor, batch: ForwardBatch) -> Generator[Tensor, None, Tensor]:
        """As Mixer.steps."""
        total = None
        for part in self._mixers:
            out = yield from part.mixer.steps(x, batch)
            total = _added(total, out, part.scale)
        assert total is not None
        return total

    def targets(self) -> dict[str, Target]:
        found: dict[str, Target] = {}
        for part in self._mixers:
            found |= prefixed(part.name, part.mixer.targets())
        return found

    def pack(self) -> None:
        for part in self._mixers:
            part.mixer.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As Mixer.record."""
        total: Buffer | None = None
        for part in self._mixers:
            out = part.mixer.record(program, x)
            if part.scale != 1.0:
                program.add(Scale(residual=out, factor=part.scale))
            if total is None:
                total = out
            else:
                program.add(Add(x=out, residual=total))
        assert total is not None
        return total


def _added(total: Tensor | None, out: Tensor, scale: float) -> Tensor:
    scaled = out if scale == 1.0 else out * scale
    return scaled if total is None else total + scaled
