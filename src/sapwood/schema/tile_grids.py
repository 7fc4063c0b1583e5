"""Which tiles show a picture in LLaVA-NeXT's families: what preparing and the tower agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_grid(size: Sequence[int], known: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of the known sizes (height, width) the one which shows most of a picture's pixels, and of
    these the one with the least of its own left over."""
    height, width = size
    best, best_shown, least_left = known[0], -1, 0
    for tall, wide in known:
        scale = min(wide / width, tall / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        left = tall * wide - shown
        if shown > best_shown or (shown == best_shown and left < least_left):
            best, best_shown, least_left = (tall, wide), shown, left
    return best


def unpadded(size: Sequence[int], grid: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a picture of that size lies in a grid into which it was fitted: ((first row, first
    column), (rows, columns))"""
    height, width = size
    rows, columns = grid
    if width / height > columns / rows:
        shown = int(round(height * (columns / width), 7))
        padding = (rows - shown) // 2
        return (padding, 0), (rows - 2 * padding, columns)
    shown = int(round(width * (rows / height), 7))
    padding = (columns - shown) // 2
    return (0, padding), (rows, columns - 2 * padding)


def shrunk(shown: tuple[int, int], most: int) -> tuple[int, int]:
    """Rows and columns of vectors after LLaVA-OneVision's shrinking, which begins a tenth above the
    side of `most` vectors."""
    height, width = shown
    ratio = math.sqrt(height * width / most)
    if ratio <= 1.1:
        return shown
    return max(1, int(height // ratio)), max(1, int(width // ratio))
