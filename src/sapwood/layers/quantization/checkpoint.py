"""The weights of a checkpoint that another tool quantised, as they are stored."""

from __future__ import annotations

import torch

from sapwood.kernels.interface import Kernels
from sapwood.layers.quantization.gguf import BlocksStorage


class CheckpointScheme:
    """Needs a loader that hands the weights through; a fused layer with a part that is not
    quantised is dense altogether."""

    def __init__(self, name: str) -> None:
        self.name = name

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
        return BlocksStorage(len(part_sizes), kernels=kernels, device=device, dtype=dtype)
