"""The page that draws and its live page in a headless Chromium, over a server of a tiny Flux."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.e2e.server import Server, serving
from tests.frontends.web.chromium import chromium, needs_chromium, watched
from tests.painting_models import flux, saved

pytestmark = needs_chromium

PROMPT = "<img src=x onerror=alert(1)> an oak"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = saved(flux(), tmp_path_factory.mktemp("models") / "tiny-flux")
    flags = ("--model", str(folder), "--served-model-name", "tiny-flux")
    with serving(*flags, "--max-inference-steps", "400") as one:
        yield one


@pytest.fixture(scope="module")
def context() -> Iterator[BrowserContext]:
    with chromium() as browser:
        context = browser.new_context(viewport={"width": 1200, "height": 800})
        yield context
        context.close()


@pytest.fixture
def page(context: BrowserContext, server: Server) -> Iterator[Page]:
    with watched(context, server.url) as page:
        page.goto(server.url)
        expect(page.locator("#model")).to_have_text("tiny-flux")
        yield page


def ask(page: Page, prompt: str, *, steps: int = 3) -> None:
    page.get_by_label("Prompt").fill(prompt)
    for label, value in (("Width", 64), ("Height", 48), ("Steps", steps), ("Seed", 7)):
        page.get_by_label(label, exact=True).fill(str(value))
    page.get_by_role("button", name="Draw").click()


def test_a_picture_is_drawn_and_stays_in_the_gallery(page: Page):
    ask(page, PROMPT)
    drawn = page.locator("#gallery img")
    expect(drawn).to_have_count(1)
    expect(page.locator("#status")).to_have_text("Done.")
    size = drawn.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert size == [64, 48]
    assert drawn.get_attribute("alt") == PROMPT, "a prompt is text, whatever it says"
    page.reload()
    expect(page.locator("#gallery img")).to_have_count(1)
    # The same fields again, with its seed, draw the same picture.
    page.get_by_role("button", name="Again").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("7")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#gallery img")).to_have_count(2)
    first, second = (image.get_attribute("src") for image in page.locator("#gallery img").all())
    assert first == second
    for _ in range(2):
        page.get_by_label(f"Delete {PROMPT}").first.click()
    expect(page.locator("#gallery img")).to_have_count(0)
    expect(page.locator("#no-pictures")).to_be_visible()


def test_steps_are_counted_and_a_picture_can_be_stopped(page: Page):
    ask(page, "an oak", steps=400)
    expect(page.locator("#status")).to_contain_text("of 400")
    expect(page.locator("#progress")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.locator("#gallery img")).to_have_count(0)


def test_a_refusal_is_told(page: Page):
    ask(page, "an oak", steps=401)
    expect(page.locator(".notice")).to_contain_text("at most 400")


def test_the_live_page_counts(page: Page, server: Server):
    page.goto(f"{server.url}/dashboard")
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#model")).to_have_text("tiny-flux")
    expect(page.locator("#num_aborted")).to_have_text("1")
    expect(page.locator("#num_done")).to_have_text("2")
    expect(page.locator("#resident_bytes")).to_contain_text("B")
