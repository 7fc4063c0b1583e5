"""Pictures for tests."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3))
    return Image.fromarray(noise.astype(np.uint8))


def png(shown: Image.Image) -> bytes:
    out = io.BytesIO()
    shown.save(out, "PNG")
    return out.getvalue()


def data_url(shown: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(shown)).decode()
