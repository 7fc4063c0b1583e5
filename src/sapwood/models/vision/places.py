"""Learned positions of patches, for pictures of other sizes than they were learned on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def between(places: Tensor, height: int, width: int, *, antialias: bool = False) -> Tensor:
    """places [rows, columns, size] -> [height, width, size], between the learned ones.

    antialias  whether several are mixed where there are fewer than were learned"""
    if places.shape[:2] == (height, width):
        return places
    found = F.interpolate(
        places.permute(2, 0, 1)[None].to(torch.float32),
        (height, width),
        mode="bilinear",
        align_corners=False,
        antialias=antialias,
    )
    return found[0].permute(1, 2, 0).to(places.dtype)
