"""The ranks that share a model, and the collectives that layers need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sapwood.distributed.shared_memory import SharedMemory


class Work(Protocol):
    def wait(self) -> object: ...


class ProcessGroup(Protocol):
    """A group of torch.distributed: one of the process's own, or a free one (see meeting.py)."""

    def allreduce(self, tensors: list[Tensor], /) -> Work: ...

    def allgather(self, parts: list[list[Tensor]], tensors: list[Tensor], /) -> Work: ...

    def alltoall_base(
        self,
        out: Tensor,
        x: Tensor,
        received: Sequence[int],
        sent: Sequence[int],
        options: dist.AllToAllOptions,
        /,
    ) -> Work: ...

    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions, /) -> Work: ...

    def send(self, tensors: list[Tensor], rank: int, tag: int, /) -> Work: ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int, /) -> Work: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """This rank's place among the ranks that hold the parts of one model (tensor parallelism).

    rank           0 .. size - 1
    process_group  torch.distributed's group (gloo, nccl); None only when size is 1
    memory         of ranks on one machine's CPUs, faster than gloo; None: they have none
    """

    rank: int = 0
    size: int = 1
    process_group: ProcessGroup | None = None
    memory: SharedMemory | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be in 0 .. {self.size - 1}, got {self.rank}")
        if self.size > 1 and self.process_group is None:
            raise ValueError(f"a group of {self.size} ranks needs a process group")

    @staticmethod
    def of(process_group: dist.ProcessGroup) -> Group:
        """The group that torch.distributed made, as seen by this rank."""
        return Group(
            rank=dist.get_rank(process_group),
            size=dist.get_world_size(process_group),
            process_group=cast(Any, process_group),
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, which is overwritten with it; x itself when alone."""
        if self.memory is not None and self.memory.can_add_up(x):
            self.memory.add_up(x)
        elif self.process_group is not None:
            self.process_group.allreduce([x]).wait()
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x [n, m] side by side, by rank: [n, size * m]; x itself when alone."""
        if self.process_group is None:
            return x
        if self.memory is not None:
            return self.memory.gather(x)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.process_group.allgather([parts], [x.contiguous()]).wait()
        return torch.cat(parts, dim=-1)

    def all_to_all(self, x: Tensor, counts: Tensor) -> Tensor:
        """Send some rows of x [n, m] to each rank -> the rows [received, m] from all ranks, by
        rank; x itself when alone.

        x       rows for rank 0 first, then those for rank 1, and so on
        counts  [size, size] int64 on the host, alike on all ranks: how many rows each rank (its
                row) sends to each other one
        """
        if self.process_group is None:
            return x
        sent, received = counts[self.rank].tolist(), counts[:, self.rank].tolist()
        out = x.new_empty((sum(received), x.shape[1]))
        if self.memory is not None:
            self.memory.exchange(x, out, counts)
            return out
        self.process_group.alltoall_base(
            out, x.contiguous(), received, sent, dist.AllToAllOptions()
        ).wait()
        return out

    def stop(self) -> None:
        """A rank is gone: exchanges that wait for it fail, those of gloo and NCCL by themselves."""
        if self.memory is not None:
            self.memory.stop()

    def broadcast(self, x: Tensor) -> Tensor:
        """x of the first rank, which overwrites every other rank's."""
        if self.process_group is not None:
            options = dist.BroadcastOptions()
            options.rootRank = 0
            self.process_group.broadcast([x], options).wait()
        return x
