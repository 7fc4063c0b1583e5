from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.frontends.web.chromium import chromium, watched


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """What belongs to one user of the browser: storage, tabs, downloads."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, live) -> Iterator[Page]:
    """The chat page of a server whose engine answers from a script."""
    with watched(context, live.url) as page:
        page.goto(live.url)
        expect(page.locator("#model")).to_have_text("org/tiny")
        yield page
