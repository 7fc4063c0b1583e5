"""A feed-forward that is split over ranks, of which each has requests of its own."""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.recording import CannotRecord, Program
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.layer import FeedForward
from sapwood.layers.shared_rows import SharedRows
from sapwood.layers.targets import Target


class SharedFeedForward:
    """See `layer.FeedForward`: `own`, which is this rank's part, computes the rows of all ranks; or
    those that others send to it, if it exchanges rows by itself."""

    sends_rows = False

    def __init__(self, own: FeedForward, rows: SharedRows) -> None:
        self._own = own
        self._rows = rows

    def __call__(self, x: Tensor) -> Tensor:
        if self._own.sends_rows:
            return self._own(x)
        return self._rows.own(self._own(self._rows.gathered(x)))

    def take_part(self) -> None:
        """Compute a call of other ranks, in a step in which this rank has no rows."""
        self(self._rows.none)

    def steps(self, x: Tensor) -> Generator[Tensor, None, Tensor]:
        raise ConfigError("a model is converted on one rank; leave out --enable-dp-attention")

    def targets(self) -> dict[str, Target]:
        return self._own.targets()

    def pack(self) -> None:
        self._own.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        raise CannotRecord("ranks exchange their rows between the ops of a step")
