"""What the ops of a recorded step read and write."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Buffer:
    """Activations [rows, width] of the program's dtype, one row per token of the step.

    index  tells the buffers of a program apart
    """

    index: int
    width: int
