"""A captured step in pieces: between them runs what depends on which tokens belong to which
request, for the batch of each step anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sapwood.kernels.capture import Capture, Replayable
from sapwood.layers.forward_batch import ForwardBatch, Work

Part = Callable[[ForwardBatch, int], None]
"""Computes a part of a step for a batch and its number of tokens."""


class Spaces:
    """Fixed memory between pieces, by its use, shape and dtype.

    Layers run one after the other, so that all of them can share it; so can all sizes of steps, if
    the largest comes first."""

    def __init__(self) -> None:
        self._spaces: dict[tuple[object, ...], Tensor] = {}

    def like(self, use: str, rows: Tensor) -> Tensor:
        """Space for these rows [T, ...]."""
        key = (use, tuple(rows.shape[1:]), rows.dtype)
        if key not in self._spaces:
            self._spaces[key] = torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
        return self._spaces[key][: len(rows)]


@dataclass(slots=True)
class _Between:
    """Work between two pieces: from rows [size, ...] to `out`, [size, ...], all of them fixed."""

    work: Work
    rows: tuple[Tensor, ...]
    out: Tensor

    def __call__(self, batch: ForwardBatch, num_tokens: int) -> None:
        rows = [one[:num_tokens] for one in self.rows]
        self.out[:num_tokens].copy_(self.work(batch, *rows))


@dataclass(frozen=True, slots=True)
class CapturedPieces:
    """The parts of a step, and where they leave the hidden states [size, hidden]."""

    parts: list[Part]
    hidden: Tensor


@dataclass(slots=True)
class Pieces:
    """A step that is being recorded: pieces, and work between them.

    batch  a step of nobody's tokens, of the size of the step"""

    batch: ForwardBatch
    recorder: Capture
    spaces: Spaces
    parts: list[Part] = field(default_factory=list)
    _outputs: list[Tensor] = field(default_factory=list)

    def warm_up(self, work: Work, rows: tuple[Tensor, ...]) -> Tensor:
        """Do the work for nobody's tokens: the first use compiles, and its result shows how much
        memory it takes. A recording must not allocate any."""
        for index, one in enumerate(rows):
            self.spaces.like(f"row {index}", one)
        result = work(self.batch, *rows)
        self._outputs.append(self.spaces.like("result", result))
        return result

    def cut(self, work: Work, rows: tuple[Tensor, ...]) -> Tensor:
        """End the piece that computed the rows, and begin the next piece."""
        spaces = tuple(self.spaces.like(f"row {index}", one) for index, one in enumerate(rows))
        for space, one in zip(spaces, rows, strict=True):
            space.copy_(one)
        self.add(self.recorder.end())
        out = self._outputs.pop(0)
        self.parts.append(_Between(work, spaces, out))
        self.recorder.begin()
        return out

    def add(self, piece: Replayable) -> None:
        def replay(batch: ForwardBatch, num_tokens: int) -> None:
            piece.replay()

        self.parts.append(replay)
