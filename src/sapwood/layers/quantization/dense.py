"""Weights of a float dtype: that of the activations, or a narrower one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.interface import Kernels
from sapwood.kernels.many_rows import pack_many_rows
from sapwood.kernels.packed import PackedLinear


class DenseStorage:
    """One tensor [out, in] in which the parts lie one after another.

    The tensor is allocated at its first use, so that a model takes memory layer by layer while it
    is loaded.
    """

    takes_blocks = False

    def __init__(
        self,
        part_sizes: tuple[int, ...],
        kernels: Kernels,
        dtype: torch.dtype,
        allocate: Callable[[], Tensor] | None,
        *,
        has_many_rows: bool = False,
    ) -> None:
        """The storage of a dense weight.

        dtype     of the activations
        allocate  makes the tensor; None: another layer's tensor will be shared
        has_many_rows  as of DenseScheme
        """
        self._kernels = kernels
        self._dtype = dtype
        self._has_many_rows = has_many_rows
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
        own = self.weight[first : first + self._part_sizes[part]]
        own.copy_(shard)
        check_range(own, shard)

    def place_blocks(self, part: int, shard: LinearPart) -> None:
        self.place(part, shard.dequantized(torch.float32))

    def share(self, weight: Tensor, blocks: LinearPart | None) -> None:
        self._weight = weight

    def pack(self, bias: Tensor | None) -> PackedLinear:
        if self._has_many_rows:
            packed = pack_many_rows(self._kernels, self.weight, bias, self._dtype)
        else:
            packed = self._kernels.pack_linear(self.weight, bias, self._dtype)
        self._weight = None  # frees the memory although targets still refer to this storage
        return packed

    def repack(self, packed: PackedLinear, bias: Tensor | None) -> PackedLinear:
        if not packed.refill(self.weight):
            return self.pack(bias)
        self._weight = None
        return packed


def check_range(stored: Tensor, shard: Tensor) -> None:
    """WeightError if a finite number of `shard` is infinite in `stored`, its copy in float16."""
    if stored.dtype != torch.float16 or shard.dtype == torch.float16:
        return
    if bool((stored.isinf() & shard.to(stored.device).isfinite()).any()):
        raise WeightError(
            f"a weight of {shard.abs().amax().item():g} is beyond float16, whose largest number is "
            "65504; start with --weight-dtype bfloat16"
        )


class DenseScheme:
    """No quantisation.

    weight_dtype   in which weights and the embedding are kept; None: that of the activations
    has_many_rows  whether the layers are nearly always called with thousands of rows
    """

    name = "none"

    def __init__(
        self, weight_dtype: torch.dtype | None = None, *, has_many_rows: bool = False
    ) -> None:
        self.weight_dtype = weight_dtype
        self._has_many_rows = has_many_rows

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
        stored = self.weight_dtype or dtype
        allocate = partial(torch.empty, (sum(part_sizes), in_size), device=device, dtype=stored)
        return DenseStorage(
            part_sizes,
            kernels,
            dtype,
            None if tied else allocate,
            has_many_rows=self._has_many_rows,
        )


DENSE = DenseScheme()
MANY_ROWS = DenseScheme(has_many_rows=True)
