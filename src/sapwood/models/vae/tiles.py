"""Large pictures tile by tile: memory for one tile, and a stop between any two.

Tiles overlap by a quarter, and are blended there. Source: diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

OVERLAP = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Sizes in elements of the input and of the output, of the last two dimensions.

    tile    of a tile of the input
    stride  from one tile of the input to the next
    blended  elements of the output that a tile shares with the one before
    kept    elements of the output that a tile gives
    """

    tile: int
    stride: int
    blended: int
    kept: int

    @staticmethod
    def of(in_size: int, out_size: int) -> Tiling:
        """For tiles of in_size that become out_size."""
        blended = int(out_size * OVERLAP)
        return Tiling(
            tile=in_size,
            stride=int(in_size * (1 - OVERLAP)),
            blended=blended,
            kept=out_size - blended,
        )

    def is_needed(self, x: Tensor) -> bool:
        return x.shape[-1] > self.tile or x.shape[-2] > self.tile


def compute_tiled(
    x: Tensor, compute: Callable[[Tensor], Tensor], tiling: Tiling
) -> Generator[None, None, Tensor]:
    """compute(x) of tiles, blended; yields after every tile, so that other work can go between."""
    above: list[Tensor] = []
    finished: list[Tensor] = []
    for top in range(0, x.shape[-2], tiling.stride):
        row: list[Tensor] = []
        for left in range(0, x.shape[-1], tiling.stride):
            part = x[..., top : top + tiling.tile, left : left + tiling.tile]
            row.append(compute(part))
            yield
        for index, tile in enumerate(row):
            if above:
                _blend(above[index], tile, tiling.blended, dim=-2)
            if index:
                _blend(row[index - 1], tile, tiling.blended, dim=-1)
        finished.append(torch.cat([tile[..., : tiling.kept, : tiling.kept] for tile in row], -1))
        above = row
    return torch.cat(finished, dim=-2)


def _blend(before: Tensor, after: Tensor, width: int, *, dim: int) -> None:
    """Let `after` begin as `before` ends, in place."""
    width = min(before.shape[dim], after.shape[dim], width)
    if not width:
        return
    share = torch.arange(width, dtype=after.dtype, device=after.device) / width
    if dim == -2:
        share = share[:, None]
    end = before.narrow(dim, before.shape[dim] - width, width)
    start = after.narrow(dim, 0, width)
    start.copy_(end * (1 - share) + start * share)
