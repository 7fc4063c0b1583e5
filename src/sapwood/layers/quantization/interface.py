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
from sapwood.kernels.interface import Kernels, PackedLinear


class LinearStorage(Protocol):
    """The weight of one linear layer on this rank, while it is loaded.

    takes_blocks  whether `place_blocks` may be called: else quantised tensors of a checkpoint are
                  dequantised first
    """

    takes_blocks: bool

    @property
    def weight(self) -> Tensor:
        """[out, in]; RuntimeError if the storage does not keep one."""
        ...

    def place(self, part: int, shard: Tensor) -> None:
        """This rank's shard [outputs of the part, in] of a checkpoint's tensor."""
        ...

    def place_blocks(self, part: int, shard: LinearPart) -> None:
        """The same, as the checkpoint has it; only if `takes_blocks`."""
        ...

    def share(self, weight: Tensor, blocks: LinearPart | None) -> None:
        """Take the weight of the embedding to which this output layer is tied: `blocks` is what the
        checkpoint had it in, where that is known. It is read and not changed."""
        ...

    def pack(self, bias: Tensor | None) -> PackedLinear:
        """The layer, once all parts are placed."""
        ...


class LinearScheme(Protocol):
    """name: as --quantization spells it; "none" for weights of the model's dtype."""

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

        makes_logits  it is the model's output layer, whose errors nothing after it evens out
        tied          the weight comes by `share`, so that none is allocated
        Raises        ConfigError if the scheme cannot store such a weight
        """
        ...
