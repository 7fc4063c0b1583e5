"""Feed-forwards of ranks that have requests of their own: each computes the rows of all ranks.

Attention looks at the tokens of a rank's own requests. What looks at each token alone is split
over the ranks: before it their rows are gathered, and after it each rank keeps its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.distributed.groups import Group


class SharedRows:
    """How many rows each rank brings to what the ranks compute together.

    All ranks call `begin` at the same place of a step, and then compute the same layers in the
    same order, also a rank that brings no rows.
    """

    def __init__(
        self,
        group: Group,
        counting: Group,
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """The rows of one model's steps.

        group         the ranks that share the layers
        counting      the same ranks, which exchange numbers in the host's memory
        width, dtype  of all rows
        """
        self._group = group
        self._counting = counting
        self._counts = [0] * group.size
        self._none = torch.empty(0, width, dtype=dtype, device=device)

    def begin(self, num_own: int) -> bool:
        """Tell all ranks how many rows this rank brings from now on; whether any brings some."""
        self._counts = self._counting.all_gather(torch.tensor([[num_own]]))[0].tolist()
        return any(self._counts)

    @property
    def none(self) -> Tensor:
        """What a rank without rows brings, [0, width]."""
        return self._none

    def gathered(self, x: Tensor) -> Tensor:
        """This rank's x [own rows, width] -> [all rows, width], by rank"""
        expected = (self._counts[self._group.rank], self._none.shape[1])
        if tuple(x.shape) != expected or x.dtype != self._none.dtype:
            raise ValueError(
                f"a rank brings {x.dtype} of {tuple(x.shape)}, not {self._none.dtype} of {expected}"
            )
        most = max(self._counts)
        padded = F.pad(x, (0, 0, 0, most - len(x)))
        found = self._group.all_gather(padded.reshape(1, -1)).view(self._group.size, most, -1)
        if min(self._counts) == most:
            return found.flatten(0, 1)
        return torch.cat([rows[:num] for rows, num in zip(found, self._counts, strict=True)])

    def own(self, x: Tensor) -> Tensor:
        """x [all rows, m] -> this rank's rows"""
        first = sum(self._counts[: self._group.rank])
        return x[first : first + self._counts[self._group.rank]]
