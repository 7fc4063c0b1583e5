"""Rotary positions with several axes: a part of each head for time, one for height, one for width.

Source: Su et al. 2021, arXiv:2104.09864; Heo et al. 2024, arXiv:2403.13298."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class AxialRope:
    """Rotations of neighbouring pairs of a head's entries.

    The angles of an axis's positions are computed once, and looked up afterwards."""

    def __init__(self, axes: Sequence[int], theta: float, device: torch.device) -> None:
        """axes: entries of a head for each axis, an even number"""
        self._axes = tuple(axes)
        self._device = device
        self._frequencies = [
            1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size) for size in axes
        ]
        self._known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, positions: Tensor) -> Tensor:
        """positions [S, axes], int64 on the CPU -> rotations [S, head_dim / 2] complex64"""
        angles = [
            torch.outer(positions[:, axis].double(), frequencies)
            for axis, frequencies in enumerate(self._frequencies)
        ]
        return rotations(torch.cat(angles, dim=-1)).to(self._device)


def rotations(angles: Tensor) -> Tensor:
    """angles [...] fp64 -> complex64 numbers of length 1"""
    return torch.complex(angles.cos().float(), angles.sin().float())


def grid(*sizes: int) -> Tensor:
    """Positions of a picture's tokens, the last axis fastest: [product, len(sizes)] int64"""
    axes = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    return torch.stack(axes, dim=-1).reshape(-1, len(sizes))
