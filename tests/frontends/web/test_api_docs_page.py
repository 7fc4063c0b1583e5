"""The page at /docs in a headless Chromium."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.frontends.web.chromium import chromium, needs_chromium

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_docs(browser: Browser) -> Iterator[Callable[[str], Page]]:
    """Opens /docs of a server. It must load nothing from elsewhere and keep to its policy."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    problems: list[str] = []
    elsewhere: list[str] = []

    def open_page(url: str) -> Page:
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if _breach(said.text) else None)
        page.on("request", lambda r: None if _own(r.url, url) else elsewhere.append(r.url))
        page.goto(f"{url}/docs")
        return page

    yield open_page
    context.close()
    assert problems == []
    assert elsewhere == []


def _breach(text: str) -> bool:
    return "Content Security Policy" in text


def _own(address: str, url: str) -> bool:
    return address.startswith((url, "data:"))


def try_models(page: Page) -> None:
    link = page.get_by_role("link", name="/v1/models", exact=True)
    route = page.locator(".opblock", has=link)
    route.locator(".opblock-summary-control").click()
    route.get_by_role("button", name="Try it out").click()
    route.get_by_role("button", name="Execute").click()
    expect(route.locator(".live-responses-table")).to_contain_text("org/tiny")


def test_the_page_lists_the_routes_and_tries_one(open_docs, live):
    page = open_docs(live.url)
    expect(page.get_by_role("link", name="/v1/chat/completions", exact=True)).to_be_visible()
    try_models(page)


def test_a_server_with_a_key_is_asked_with_that_key(open_docs, locked_live):
    page = open_docs(locked_live.url)
    page.get_by_label("This server asks for its API key").fill("wrong")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("alert")).to_have_text("The server refused that key.")
    page.get_by_label("This server asks for its API key").fill("open sesame")
    page.get_by_role("button", name="Show").click()
    try_models(page)
    expect(page.get_by_label("This server asks for its API key")).to_be_hidden()
