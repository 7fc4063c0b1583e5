"""The pictures of the pages can be taken, and the documentation has them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from sapwood.store import ModelFiles
from tests.docs import pictures
from tests.docs.test_docs import PAGES
from tests.frontends.web.chromium import needs_chromium

WIDTHS = {
    "chat.png": 1200,
    "chat-dark.png": 1200,
    "chat-history.png": 1200,
    "chat-phone.png": 390,
    "dashboard.png": 1200,
}
MAX_BYTES = 200_000
"""Of a picture, so that the repository stays small."""


@needs_chromium
@pytest.mark.long
def test_all_are_taken_of_a_real_server(smollm2_files: ModelFiles, tmp_path: Path) -> None:
    assert pictures.main(["--seconds", "8", "--to", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(WIDTHS)
    for name, wanted in WIDTHS.items():
        width, height = size_of(tmp_path / name)
        assert width == wanted
        assert height >= 800


@pytest.mark.parametrize("name", WIDTHS)
def test_a_page_shows_it(name: str) -> None:
    assert any(f"images/{name})" in page.read_text("utf-8") for page in PAGES)
    assert size_of(pictures.IMAGES / name)[0] == WIDTHS[name]
    assert (pictures.IMAGES / name).stat().st_size <= MAX_BYTES


def size_of(path: Path) -> tuple[int, int]:
    """Of a PNG. Raises ValueError if it is none."""
    head = path.read_bytes()[:24]
    if not head.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{path} is no PNG")
    width, height = struct.unpack(">II", head[16:24])
    return width, height
