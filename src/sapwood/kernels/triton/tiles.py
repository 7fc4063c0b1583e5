"""Which tile of a product one program computes."""

from __future__ import annotations

from dataclasses import dataclass

_FIXED_ROWS = 64
"""Rows whose tile serves every number of rows where tiles are fixed: 64 are one instruction of
Hopper's matrix units, and a batch of few rows still reads the weight with many programs."""


@dataclass(slots=True)
class TileChoice:
    """How products and attention are cut into programs; the layers of one TritonKernels share it.

    fixed  the same way whatever the batch is. Then a row's sums have one order: matrix units may
           add in another order in a tile of another size
    """

    fixed: bool = False

    def of(self, rows: int) -> tuple[int, int, int]:
        """(rows, outputs, warps) of one program's tile, of a product of so many rows."""
        return tile(_FIXED_ROWS if self.fixed else rows)


def tile(rows: int) -> tuple[int, int, int]:
    """(rows, outputs, warps) of one program's tile: few outputs where rows are few, so that a small
    batch, which only reads the weight, reads it with as many programs as there can be."""
    if rows <= 16:
        return 16, 32, 4
    if rows <= 64:
        return 64, 64, 4
    return 128, 128, 8
