"""Quantised weights as a checkpoint has them, each tensor in the type that the file gives it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sapwood.kernels.coded import LinearPart
from sapwood.kernels.interface import Kernels
from sapwood.kernels.packed import PackedLinear
from sapwood.kernels.quantized import QuantizedWeight


class BlocksStorage:
    """One part per tensor: blocks, or a dense weight if kernels cannot use the file's blocks.

    A fused layer with a dense part is dense altogether, so that it is one matrix product.
    """

    takes_blocks = True

    def __init__(
        self,
        num_parts: int,
        *,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
        x_bits: int = 8,
    ) -> None:
        """`x_bits` of QuantizedWeight, for blocks."""
        self._x_bits = x_bits
        self._kernels = kernels
        self._device = device
        self._dtype = dtype
        self._blocks: dict[int, LinearPart] = {}
        self._dense: dict[int, Tensor] = {}
        self._num_parts = num_parts

    @property
    def weight(self) -> Tensor:
        raise RuntimeError("this layer's weight is kept as the file's blocks only")

    def place(self, part: int, shard: Tensor) -> None:
        # A copy, because the shard may be a view that would keep the whole tensor in memory.
        self._dense[part] = shard.to(self._device, self._dtype, copy=True)

    def place_blocks(self, part: int, shard: LinearPart) -> None:
        if isinstance(shard, QuantizedWeight) and self._x_bits != shard.x_bits:
            shard = replace(shard, x_bits=self._x_bits)
        self._blocks[part] = shard.to(self._device)

    def share(self, weight: Tensor, blocks: LinearPart | None) -> None:
        if blocks is not None:
            self.place_blocks(0, blocks)
        else:
            self._dense[0] = weight

    def pack(self, bias: Tensor | None) -> PackedLinear:
        if len(self._blocks) + len(self._dense) != self._num_parts:
            raise RuntimeError("a part of this layer has not been placed")
        blocks, dense = self._blocks, self._dense
        self._blocks, self._dense = {}, {}  # targets may still refer to this storage
        order = range(self._num_parts)
        if not dense:
            parts = [blocks[part] for part in order]
            return self._kernels.pack_quantized_linear(parts, bias, self._dtype)
        weights = [
            dense[part] if part in dense else blocks[part].dequantized(self._dtype)
            for part in order
        ]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        return self._kernels.pack_linear(weight, bias, self._dtype)

    def repack(self, packed: PackedLinear, bias: Tensor | None) -> PackedLinear:
        return self.pack(bias)


class CheckpointScheme:
    """The weights of a checkpoint that another tool quantised, as they are stored.

    The scheme needs a loader that hands quantised weights through. A fused layer with a part that
    is not quantised is dense altogether.
    """

    def __init__(self, name: str, x_bits: int = 8) -> None:
        """`x_bits` of QuantizedWeight, for blocks."""
        self.name = name
        self._x_bits = x_bits

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
    ) -> BlocksStorage:
        return BlocksStorage(
            len(part_sizes), kernels=kernels, device=device, dtype=dtype, x_bits=self._x_bits
        )


def gguf_scheme() -> CheckpointScheme:
    """The blocks of a GGUF file; activations keep what bfloat16 has."""
    return CheckpointScheme("gguf", x_bits=16)


def gguf_a8_scheme() -> CheckpointScheme:
    """The blocks of a GGUF file; activations in 8 bits, as in w4a8."""
    return CheckpointScheme("gguf_a8")
