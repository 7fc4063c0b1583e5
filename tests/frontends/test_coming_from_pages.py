"""Every route that a page about coming from another server promises is answered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("coming-from-*.md"))


def routes(page: Path) -> set[str]:
    """The routes in the second cells of the page's tables."""
    rows = re.findall(r"^\|[^|]*\|([^|]*)\|", page.read_text("utf-8"), re.MULTILINE)
    return {route for cell in rows for route in re.findall(r"`(/[\w/]+)`", cell)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_route_exists(api, page):
    named = routes(page)
    assert len(named) > 8
    missing = [route for route in sorted(named) if api.get(route).status_code == 404]
    assert missing == []
