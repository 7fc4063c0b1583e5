"""The headless Chromium in which pages are tested and their pictures taken."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path")

# Other tests run on the same cores; the five seconds that playwright waits are too few then.
expect.set_options(timeout=30_000)

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def watched(context: BrowserContext, url: str) -> Iterator[Page]:
    """A page that must end without an error, a breach of its own policy, or a request elsewhere."""
    problems: list[str] = []

    def check_console(message) -> None:
        if "Content Security Policy" in message.text or "TrustedHTML" in message.text:
            problems.append(message.text)

    def check_request(request) -> None:
        if not request.url.startswith((url, f"blob:{url}", "data:image/")):
            problems.append(f"a request to {request.url}")

    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", check_console)
    page.on("request", check_request)
    yield page
    assert problems == []


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def answered(page: Page, num_answers: int = 1) -> None:
    expect(page.locator(".message.assistant:not(.busy)")).to_have_count(num_answers)
