"""Pictures of a request as an autoencoder wants them, and latents as tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


def pack(latents: Tensor) -> Tensor:
    """latents [channels, h, w] -> [h/2 * w/2, channels * 4]: four neighbours are one token"""
    channels, height, width = latents.shape
    blocks = latents.reshape(channels, height // 2, 2, width // 2, 2)
    return blocks.permute(1, 3, 0, 2, 4).reshape((height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `pack`; size: (h, w)"""
    height, width = size
    blocks = tokens.reshape(height // 2, width // 2, -1, 2, 2)
    return blocks.permute(2, 0, 3, 1, 4).reshape(-1, height, width)


def as_picture(pixels: Tensor) -> Image.Image:
    """pixels [H, W, 3] uint8"""
    from PIL import Image

    return Image.fromarray(pixels.numpy())


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """pixels [H, W, 3] uint8 -> [height, width, 3] uint8, as diffusers resizes pictures."""
    import numpy as np
    from PIL import Image

    picture = as_picture(pixels).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture))


def from_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """mask [H, W] uint8 -> [1, 1, height, width] fp32: 1 where it is at least half, else 0."""
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(mask.numpy()).resize((width, height), Image.Resampling.LANCZOS)
    levels = torch.from_numpy(np.array(picture)).float() / 255.0
    return (levels >= 0.5).float()[None, None]


def from_pixels(pixels: Tensor) -> Tensor:
    """pixels [H, W, 3] uint8 -> [1, 3, H, W] fp32 in -1..1"""
    levels = pixels.permute(2, 0, 1)[None].float() / 255.0
    return 2.0 * levels - 1.0
