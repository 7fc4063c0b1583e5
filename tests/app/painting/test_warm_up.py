"""Warm-up draws the sizes that are asked for, and says why it cannot."""

from __future__ import annotations

import pytest

from sapwood.app.painting.warm_up import warm_up
from sapwood.base.errors import ConfigError
from sapwood.diffusion.memory import PictureMemory
from sapwood.schema.config.painting import PaintingConfig
from tests.diffusion.pipelines import CountingPipeline


def test_each_size_is_drawn_with_one_step():
    pipeline = CountingPipeline()
    doing: list[str] = []
    notes = warm_up(pipeline, [(64, 32), (16, 16)], None, beat=doing.append)
    assert pipeline.batches == [1, 1]
    assert pipeline.pieces == [0, 1, 2] * 2
    assert doing == ["warming up with 64x32", "warming up with 16x16"]
    assert len(notes) == 2
    assert notes[0].startswith("warm-up: 64x32")


def test_a_size_that_does_not_fit_is_refused_by_figures():
    room = PictureMemory(
        free_bytes=1000,
        bytes_per_token=1,
        bytes_per_pixel=10,
        piece_pixels=None,
        pixels_per_token=64,
    )
    with pytest.raises(ConfigError, match=r"--warmup-resolutions 64x32: .*at most 100 pixels"):
        warm_up(CountingPipeline(), [(64, 32)], room)


def test_sizes_of_the_flag():
    config = PaintingConfig(warmup=True, warmup_resolutions="512x512,1024x768")
    assert config.warmup_sizes == ((512, 512), (1024, 768))
    assert PaintingConfig(warmup=True).warmup_sizes == ()
    for wrong in ("", "512", "0x5", "5x5,", "5x5;6x6", "9" * 99):
        with pytest.raises(ConfigError, match="such as 512x512"):
            PaintingConfig(warmup=True, warmup_resolutions=wrong)
    with pytest.raises(ConfigError, match="does nothing without --warmup"):
        PaintingConfig(warmup_resolutions="5x5")
