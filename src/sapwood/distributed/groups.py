"""The ranks that share a model, and the two collectives that layers need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """This rank's place among the ranks that hold the parts of one model (tensor parallelism).

    rank           0 .. size - 1
    process_group  torch.distributed's group (gloo, nccl); None only when size is 1
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

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
            process_group=process_group,
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, which is overwritten with it; x itself when alone."""
        if self.process_group is not None:
            dist.all_reduce(x, group=self.process_group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x [n, m] side by side, by rank: [n, size * m]; x itself when alone."""
        if self.process_group is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.process_group)
        return torch.cat(parts, dim=-1)
