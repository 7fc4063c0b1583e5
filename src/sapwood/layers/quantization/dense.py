"""Weights of the model's dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sapwood.kernels.coded import LinearPart
from sapwood.kernels.interface import Kernels, PackedLinear


class DenseStorage:
    """One tensor [out, in] in which the parts lie one after another.

    The tensor is allocated at its first use, so that a model takes memory layer by layer while it
    is loaded.
    """

    takes_blocks = False

    def __init__(
        self, part_sizes: tuple[int, ...], kernels: Kernels, allocate: Callable[[], Tensor] | None
    ) -> None:
        """allocate: makes the tensor; None: it will be shared."""
        self._kernels = kernels
        self._part_sizes = part_sizes
        self._allocate = allocate
        self._weight: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        if self._weight is None:
            if self._allocate is None:
                raise RuntimeError(
                    "this layer's weight is another's, which has not been shared yet"
                )
            self._weight = self._allocate()
        return self._weight

    def place(self, part: int, shard: Tensor) -> None:
        first = sum(self._part_sizes[:part])
        self.weight[first : first + self._part_sizes[part]].copy_(shard)

    def place_blocks(self, part: int, shard: LinearPart) -> None:
        self.place(part, shard.dequantized(self.weight.dtype))

    def share(self, weight: Tensor, blocks: LinearPart | None) -> None:
        self._weight = weight

    def pack(self, bias: Tensor | None) -> PackedLinear:
        packed = self._kernels.pack_linear(self.weight, bias)
        self._weight = None  # targets may still refer to this storage
        return packed


class DenseScheme:
    """No quantisation."""

    name = "none"

    def storage(
        self,
        in_size: int,
        part_sizes: tuple[int, ...],
        *,
        makes_logits: bool,
        tied: bool,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
    ) -> DenseStorage:
        allocate = partial(torch.empty, (sum(part_sizes), in_size), device=device, dtype=dtype)
        return DenseStorage(part_sizes, kernels, None if tied else allocate)


DENSE = DenseScheme()
