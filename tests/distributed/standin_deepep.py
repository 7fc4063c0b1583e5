"""What stands for the package deep_ep where there is no GPU: the same calls, over any group.

It follows deep_ep.Buffer's documented contract a row at a time, and moves rows as the bytes that
its communicator gathers. Each call checks what the library's kernels check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.distributed.deepep import HostComm

ALIGNMENT = 16


@dataclass(frozen=True)
class Config:
    chunk: int

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self.chunk * hidden_bytes * num_ranks


@dataclass(frozen=True)
class Handle:
    """For each rank, the rows that came from it; for each rank, the own rows that went to it."""

    came: list[int]
    went: list[list[int]]
    num_tokens: int


class Buffer:
    def __init__(
        self,
        group: None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        comm: HostComm | None = None,
    ) -> None:
        assert group is None
        assert comm is not None
        assert not low_latency_mode
        assert num_rdma_bytes == 0
        self._comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.num_nvl_bytes = num_nvl_bytes
        assert comm.allgather(self.rank) == list(range(self.size))
        handles = comm.allgather(b"memory" * (1 + self.rank))
        assert handles == [bytearray(b"memory" * (1 + rank)) for rank in range(self.size)]
        assert all(isinstance(one, bytearray) for one in handles)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(24)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config(256 // num_ranks)

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int
    ) -> tuple[Tensor, None, Tensor, Tensor, None]:
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        assert num_experts % self.size == 0
        per_expert = torch.zeros(num_experts, dtype=torch.int32)
        goes_to = torch.zeros(len(topk_idx), self.size, dtype=torch.bool)
        for row, experts in enumerate(topk_idx.tolist()):
            for expert in experts:
                if expert >= 0:
                    per_expert[expert] += 1
                    goes_to[row, expert // (num_experts // self.size)] = True
        return goes_to.sum(dim=0).to(torch.int32), None, per_expert, goes_to, None

    def dispatch(
        self,
        x: Tensor,
        handle: None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, list[int], Handle, None]:
        assert handle is None
        assert num_tokens_per_rdma_rank is None
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        assert topk_weights is not None
        self._check_rows(x)
        assert topk_idx.is_contiguous()
        assert topk_weights.is_contiguous()
        assert topk_weights.dtype == torch.float32
        assert topk_idx.shape == topk_weights.shape == (len(x), topk_idx.shape[1])
        assert num_tokens_per_rank.tolist() == is_token_in_rank.sum(dim=0).tolist()
        num_own = len(num_tokens_per_expert) // self.size
        first = self.rank * num_own
        went = [is_token_in_rank[:, to].nonzero().flatten().tolist() for to in range(self.size)]
        came: list[list[Tensor]] = [
            [rows[of[self.rank]] for rows in (their_x, their_idx, their_weights)]
            for of, their_x, their_idx, their_weights in zip(
                self._everybodys_lists(went),
                self._everybodys(x),
                self._everybodys(topk_idx),
                self._everybodys(topk_weights),
                strict=True,
            )
        ]
        rows, experts, weights = (torch.cat(parts) for parts in zip(*came, strict=True))
        is_own = (experts >= first) & (experts < first + num_own)
        experts = torch.where(is_own, experts - first, -1)
        weights = torch.where(is_own, weights, 0.0)
        per_expert = [int((experts == expert).sum()) for expert in range(num_own)]
        counts = [len(parts[0]) for parts in came]
        return rows, experts, weights, per_expert, Handle(counts, went, len(x)), None

    def combine(self, x: Tensor, handle: Handle) -> tuple[Tensor, None, None]:
        self._check_rows(x)
        assert len(x) == sum(handle.came)
        total = torch.zeros(handle.num_tokens, x.shape[1])
        starts = self._everybodys_lists([[sum(handle.came[:rank])] for rank in range(self.size)])
        for back, start, went in zip(self._everybodys(x), starts, handle.went, strict=True):
            for place, row in enumerate(went):
                total[row] += back[start[self.rank][0] + place].float()
        return total.to(x.dtype), None, None

    @staticmethod
    def _check_rows(x: Tensor) -> None:
        assert x.dim() == 2
        assert x.is_contiguous()
        assert x.shape[1] * x.itemsize % ALIGNMENT == 0

    def _everybodys(self, x: Tensor) -> list[Tensor]:
        found: list[Any] = self._comm.allgather(bytes(x.reshape(-1).view(torch.uint8).tolist()))
        return [
            torch.frombuffer(of, dtype=x.dtype).view(-1, x.shape[1])
            if of
            else x.new_empty(0, x.shape[1])
            for of in found
        ]

    def _everybodys_lists(self, lists: list[list[int]]) -> list[list[list[int]]]:
        sizes = self._everybodys(torch.tensor([[len(one) for one in lists]]))
        flat = self._everybodys(torch.tensor([[value] for one in lists for value in one] or [[0]]))
        return [
            [part.tolist() for part in values.flatten()[: int(size.sum())].split(size[0].tolist())]
            for size, values in zip(sizes, flat, strict=True)
        ]
