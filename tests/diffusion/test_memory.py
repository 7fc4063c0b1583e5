"""A picture that does not fit is refused by figures; one that does is drawn."""

from __future__ import annotations

import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.diffusion.memory import PictureMemory


def memory(*, piece_pixels: int | None = None, free_bytes: int = 1_000_000) -> PictureMemory:
    return PictureMemory(
        free_bytes=free_bytes,
        bytes_per_token=1000,
        bytes_per_pixel=10,
        piece_pixels=piece_pixels,
        pixels_per_token=256,
    )


def test_the_largest_that_fits_passes_and_one_pixel_more_is_refused():
    memory().check_pixels(100_000)
    with pytest.raises(InvalidRequest, match=r"at most 100000 pixels, or start .*--vae-tiling"):
        memory().check_pixels(100_001)


def test_with_tiles_any_size_passes_whose_tile_fits():
    memory(piece_pixels=4096).check_pixels(10**9)
    with pytest.raises(InvalidRequest, match=r"at most 3 pixels$"):
        memory(piece_pixels=4096, free_bytes=30).check_pixels(10**9)


def test_tokens_of_a_step_are_counted():
    memory().check_tokens(1000)
    with pytest.raises(InvalidRequest, match=r"1001 tokens.*enough for 1000 tokens") as refusal:
        memory().check_tokens(1001)
    assert refusal.value.param == "size"


def test_the_largest_picture_is_bounded_by_both_stages():
    assert memory().max_pixels == 100_000
    assert memory(piece_pixels=4096).max_pixels == 256_000
    assert memory(piece_pixels=4096, free_bytes=30).max_pixels == 0
