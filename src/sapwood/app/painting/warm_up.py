"""Pictures that are drawn before the first request: libraries choose their kernels, and memory is
taken, while nobody waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from sapwood.base.errors import ConfigError, InvalidRequest
from sapwood.diffusion.memory import PictureMemory
from sapwood.pipelines.interface import PictureRequest, Pipeline, run_whole


def warm_up(
    pipeline: Pipeline,
    sizes: Sequence[tuple[int, int]],
    room: PictureMemory | None,
    *,
    beat: Callable[[str], None] = lambda doing: None,
) -> list[str]:
    """Draw one step of each size (width, height); a line about each.

    Raises ConfigError for a size that the pipeline cannot draw, or that does not fit."""
    notes: list[str] = []
    for width, height in sizes:
        beat(f"warming up with {width}x{height}")
        started_s = time.monotonic()
        try:
            if room is not None:
                room.check_pixels(width * height)
            with torch.inference_mode():
                run_whole(pipeline, _request(pipeline, width, height))
        except InvalidRequest as error:
            raise ConfigError(f"--warmup-resolutions {width}x{height}: {error.message}") from error
        took_s = time.monotonic() - started_s
        notes.append(f"warm-up: {width}x{height} with one step took {took_s:.1f} s")
    return notes


def _request(pipeline: Pipeline, width: int, height: int) -> PictureRequest:
    traits = pipeline.traits
    grey = torch.full((height, width, 3), 128, dtype=torch.uint8)
    return PictureRequest(
        prompt="warm-up",
        width=width,
        height=height,
        num_inference_steps=1,
        images=(grey,) if traits.needs_picture else (),
        mask=grey[..., 0] if traits.needs_picture and traits.takes_mask else None,
    )
