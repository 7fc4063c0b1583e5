"""What is seen on a plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.colors import rgb_to_hsv
from matplotlib.image import imread

SATURATED = 0.3
"""From this saturation on a pixel has a colour; axes and text are grey."""
MIN_PIXELS = 100


def num_colours(path: Path) -> int:
    """How many sixths of the colour wheel a PNG has in it; a bar and its blended edge are in one.

    Raises if the file is no PNG.
    """
    hue, saturation, _ = rgb_to_hsv(imread(path, format="png")[..., :3]).reshape(-1, 3).T
    sixths = (hue[saturation > SATURATED] * 6).astype(int) % 6
    return int((np.bincount(sixths, minlength=6) >= MIN_PIXELS).sum())
