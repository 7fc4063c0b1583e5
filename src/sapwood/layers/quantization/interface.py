"""How the weight of a linear layer is stored, loaded and applied: one scheme per model.

A scheme makes a storage for every linear layer. The layer cuts this rank's shard from each tensor
of the checkpoint and hands it to the storage part by part; once everything is placed, the storage
is packed for the kernels, and dropped.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sapwood.kernels.coded import LinearPart
from sapwood.kernels.interface import Kernels
from sapwood.kernels.packed import PackedLinear


class LinearStorage(Protocol):
    """The weight of one linear layer on this rank, while it is loaded.

    takes_blocks  whether `place_blocks` may be called; if not, the checkpoint's quantised tensors
                  must be dequantised first
    """

    takes_blocks: bool

    @property
    def weight(self) -> Tensor:
        """The weight [out, in]; RuntimeError if the storage has no such tensor."""
        ...

    def place(self, part: int, shard: Tensor) -> None:
        """Take this rank's shard [outputs of the part, in] of a checkpoint's tensor."""
        ...

    def place_blocks(self, part: int, shard: LinearPart) -> None:
        """Take the same shard in the checkpoint's quantised form; only if `takes_blocks`."""
        ...

    def share(self, weight: Tensor, blocks: LinearPart | None) -> None:
        """Take the weight of the embedding to which this output layer is tied.

        The weight is read, but not changed.

        blocks  the weight in the checkpoint's quantised form; None: there is none
        """
        ...

    def pack(self, bias: Tensor | None) -> PackedLinear:
        """The layer, packed by the kernels, once all parts are placed."""
        ...

    def repack(self, packed: PackedLinear, bias: Tensor | None) -> PackedLinear:
        """The same in the place of a layer with older numbers: that one, refilled, if the kernels
        can refill it."""
        ...


class LinearScheme(Protocol):
    """Makes the storage of each linear layer.

    name  the scheme's name in --quantization; "none" for weights of the model's dtype
    """

    name: str

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
    ) -> LinearStorage:
        """Storage for a weight [sum of part_sizes, in_size] whose parts are placed one by one.

        makes_logits  whether this is the output layer, whose errors no later layer evens out
        tied          whether the weight comes by `share`, so that none is allocated
        Raises        ConfigError if the scheme cannot store such a weight
        """
        ...
