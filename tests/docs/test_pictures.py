"""The pictures of the pages can be taken, and the documentation has them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from sapwood.models.store import ModelFiles
from tests.docs import pictures
from tests.docs.test_docs import PAGES
from tests.frontends.web.test_page import CHROMIUM


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path")
def test_both_are_taken_of_a_real_server(smollm2_files: ModelFiles, tmp_path: Path) -> None:
    assert pictures.main(["--seconds", "8", "--to", str(tmp_path)]) == 0
    for name in ("chat.png", "dashboard.png"):
        width, height = size_of(tmp_path / name)
        assert width == 1200
        assert height >= 836


@pytest.mark.parametrize("name", ["chat.png", "dashboard.png"])
def test_a_page_shows_it(name: str) -> None:
    assert any(f"images/{name})" in page.read_text("utf-8") for page in PAGES)
    assert size_of(pictures.IMAGES / name)[0] == 1200


def size_of(path: Path) -> tuple[int, int]:
    """Of a PNG. Raises ValueError if it is none."""
    head = path.read_bytes()[:24]
    if not head.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{path} is no PNG")
    width, height = struct.unpack(">II", head[16:24])
    return width, height
