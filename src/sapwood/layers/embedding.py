"""Token ids to vectors and vectors to logits, the vocabulary split over the ranks.

Each rank holds ceil(vocab / ranks) rows; the last one may have fewer of its own and zeros after.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.distributed.groups import Group
from sapwood.kernels.interface import Kernels
from sapwood.layers.linear import Linear
from sapwood.layers.targets import Target


class VocabEmbedding:
    """weight [this rank's vocab, hidden]"""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        kernels: Kernels,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._kernels = kernels
        self._group = group
        self._vocab_size = vocab_size
        size = rows_per_rank(vocab_size, group)
        self._first = group.rank * size
        self.weight = torch.empty(size, hidden_size, device=device, dtype=dtype)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int64 -> [T, hidden], the same on every rank"""
        if self._group.size == 1:
            return self._kernels.embedding(token_ids, self.weight)
        local = token_ids - self._first
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = self._kernels.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self._group.all_reduce(rows.masked_fill_(elsewhere.unsqueeze(1), 0.0))

    def targets(self) -> dict[str, Target]:
        return {"weight": vocab_target(self.weight, self._vocab_size, self._first)}


class LMHead:
    """Hidden rows to logits over the whole vocabulary.

    With `tied`, the embedding whose weight it shares, it wants nothing from the checkpoint.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tied: VocabEmbedding | None,
        kernels: Kernels,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._vocab_size = vocab_size
        self._group = group
        size = rows_per_rank(vocab_size, group)
        self._first = group.rank * size
        self._tied = tied is not None
        weight = None if tied is None else tied.weight
        self._linear = Linear(
            hidden_size,
            size,
            bias=False,
            kernels=kernels,
            device=device,
            dtype=dtype,
            shared_weight=weight,
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab], the same on every rank"""
        return self._group.all_gather(self._linear(hidden))[:, : self._vocab_size]

    def targets(self) -> dict[str, Target]:
        if self._tied:
            return {}
        return {"weight": vocab_target(self._linear.weight, self._vocab_size, self._first)}

    def pack(self) -> None:
        self._linear.pack()


def rows_per_rank(vocab_size: int, group: Group) -> int:
    return -(-vocab_size // group.size)


def vocab_target(rows: Tensor, vocab_size: int, first: int) -> Target:
    """This rank's rows of the vocabulary; those past its end become zeros."""
    num_own = max(0, min(rows.shape[0], vocab_size - first))

    def place(tensor: Tensor) -> None:
        rows[:num_own].copy_(tensor[first : first + num_own])
        rows[num_own:].zero_()

    return Target((vocab_size, rows.shape[1]), place)
