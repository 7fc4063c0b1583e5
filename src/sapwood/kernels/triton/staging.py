"""From the host to the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def staged(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory [shape], not initialised, that `sent` copies while the host goes on."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def sent(host: Tensor, device: torch.device) -> Tensor:
    """`host`, which `staged` made, on the device. torch keeps it until the copy is done."""
    return host.to(device, non_blocking=True)
