"""Ranks as threads of one process, which exchange tensors in its memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from sapwood.distributed.groups import Group

R = TypeVar("R")


@dataclass(eq=False)
class Exchange:
    """What all ranks of a group share."""

    size: int
    given: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.all_here = threading.Barrier(self.size, timeout=600)


class Done:
    def wait(self) -> bool:
        return True


@dataclass(eq=False)
class ThreadGroup:
    """One rank's side, as far as models need it."""

    rank: int
    exchange: Exchange

    def _exchanged(self, x: Tensor) -> list[Tensor]:
        shared = self.exchange
        shared.given[self.rank] = x.clone()
        shared.all_here.wait()
        found = [shared.given[rank] for rank in range(shared.size)]
        shared.all_here.wait()
        return found

    def allreduce(self, tensors: list[Tensor], /) -> Done:
        for x in tensors:
            x.copy_(torch.stack(self._exchanged(x)).sum(0))
        return Done()

    def allgather(self, parts: list[list[Tensor]], tensors: list[Tensor], /) -> Done:
        for own, x in zip(parts, tensors, strict=True):
            for part, found in zip(own, self._exchanged(x), strict=True):
                part.copy_(found)
        return Done()

    def alltoall_base(
        self, out: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int], _: Any, /
    ) -> Done:
        del received  # which the others know from what they send
        pieces = self._exchanged(x), self._exchanged(torch.tensor(sent))
        mine = [
            rows.split(counts.tolist())[self.rank] for rows, counts in zip(*pieces, strict=True)
        ]
        out.copy_(torch.cat(mine))
        return Done()


def on_ranks(size: int, act: Callable[[Group], R]) -> list[R]:
    """What `act` returns on each rank of a group; the error of the rank that failed first."""
    exchange = Exchange(size)

    def run(rank: int) -> R:
        process_group: Any = ThreadGroup(rank, exchange)
        try:
            with torch.inference_mode():
                return act(Group(rank=rank, size=size, process_group=process_group))
        except BaseException:
            exchange.all_here.abort()  # or the others would wait for this rank
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda one: isinstance(one, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
