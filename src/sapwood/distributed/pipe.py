"""How hidden states go from one stage of a model to the next."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
from torch import Tensor

from sapwood.distributed.groups import ProcessGroup, Work

MOST_UNTAKEN = 8
"""Messages that wait for the next stage; a stage that is further ahead waits for it."""


class Pipe(Protocol):
    """A stage's two neighbours."""

    def receive(self, num_rows: int) -> Tensor:
        """What the stage before sends next, [num_rows, width]; waits for it."""
        ...

    def send(self, x: Tensor) -> None:
        """Send x [rows, width] to the stage after this one, without waiting until it takes it."""
        ...


class GroupPipe:
    """The pipe of a rank whose process group has one rank of each stage, in the stages' order.

    The first message between two stages is the width of all later ones: a model may have more go
    through its layers than the hidden states.
    """

    def __init__(
        self, group: ProcessGroup, rank: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """dtype: of what goes through the layers"""
        self._group = group
        self._rank = rank
        self._dtype = dtype
        self._device = device
        self._received_width = 0
        self._has_sent_width = False
        self._sending: deque[tuple[Work, Tensor]] = deque()

    def receive(self, num_rows: int) -> Tensor:
        if not self._received_width:
            width = torch.empty(1, dtype=torch.int64, device=self._device)
            self._take(width)
            self._received_width = int(width)
        x = torch.empty(num_rows, self._received_width, dtype=self._dtype, device=self._device)
        self._take(x)
        return x

    def send(self, x: Tensor) -> None:
        if x.dtype != self._dtype:
            raise TypeError(f"stages exchange {self._dtype}, not {x.dtype}")
        if not self._has_sent_width:
            self._put(torch.tensor([x.shape[1]], device=self._device))
            self._has_sent_width = True
        self._put(x.contiguous())

    def _take(self, x: Tensor) -> None:
        self._group.recv([x], self._rank - 1, 0).wait()

    def _put(self, x: Tensor) -> None:
        if len(self._sending) == MOST_UNTAKEN:
            self._sending.popleft()[0].wait()
        self._sending.append((self._group.send([x], self._rank + 1, 0), x))
