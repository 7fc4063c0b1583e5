"""The chat page in a headless Chromium."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path")

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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, live) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    problems: list[str] = []
    elsewhere: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(live.url) else elsewhere.append(r.url))
    page.goto(live.url)
    expect(page.locator("#model")).to_have_text("org/tiny")
    yield page
    context.close()
    assert problems == []
    assert elsewhere == []


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def answered(page: Page, num_answers: int = 1) -> None:
    expect(page.locator(".message.assistant:not(.busy)")).to_have_count(num_answers)


def test_an_answer_streams_in_and_is_timed(page, engine):
    engine.reply = "A radix tree shares prefixes. " * 5
    engine.step_s = 0.01
    ask(page, "What is it?")
    body = page.locator(".message.assistant .body")
    expect(body).to_contain_text("A radix")
    expect(page.locator(".message.assistant.busy")).to_have_count(1)
    answered(page)
    expect(body).to_have_text(("A radix tree shares prefixes. " * 5).strip())
    expect(page.locator(".assistant .stats")).to_have_text(
        re.compile(r"first token \d+ ms · 151 tokens · [\d.]+ tokens/s")
    )
    expect(page.get_by_label("Message")).to_have_value("")


def test_shift_enter_makes_a_line_and_the_conversation_is_kept(page, prompt_of):
    box = page.get_by_label("Message")
    box.fill("one")
    box.press("Shift+Enter")
    box.type("two")
    box.press("Enter")
    answered(page)
    ask(page, "three")
    answered(page, 2)
    assert prompt_of() == (
        "<|im_start|>user\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\nHello, wörld!<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_aborts_the_request_and_keeps_the_text(page, engine, until, how):
    engine.reply = "y" * 900
    engine.step_s = 0.01
    ask(page, "Go on")
    expect(page.locator(".message.assistant .body")).to_contain_text("yyy")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    until(lambda: len(engine.abandoned) == 1)
    answered(page)
    expect(page.locator(".assistant .stats")).to_contain_text("stopped")
    expect(page.locator(".error")).to_have_count(0)
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_parameters_arrive(page, engine, prompt_of):
    expect(page.get_by_role("complementary", name="Settings")).to_be_visible()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Top p").fill("0.8")
    page.get_by_label("Max tokens").fill("5")
    page.get_by_label("Seed").fill("11")
    ask(page, "Hi")
    answered(page)
    sampling = engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p) == (0.25, 0.8)
    assert (sampling.max_new_tokens, sampling.seed) == (5, 11)
    assert prompt_of().startswith("<|im_start|>system\nBe brief.<|im_end|>")
    expect(page.locator(".message.assistant .body")).to_have_text("Hello")
    expect(page.locator(".assistant .stats")).to_contain_text("cut off by the token limit")


def test_without_parameters_the_server_chooses(page, engine):
    ask(page, "Hi")
    answered(page)
    sampling = engine.submitted[0].sampling
    assert (sampling.temperature, sampling.seed, sampling.max_new_tokens) == (1.0, None, None)


def test_an_impossible_parameter_is_not_sent(page, engine):
    page.get_by_label("Top p").fill("7")
    ask(page, "Hi")
    expect(page.locator(".message")).to_have_count(0)
    assert engine.submitted == []


def test_markup_is_text_and_never_runs(page, engine):
    hostile = (
        "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
        "**<b>bold</b>** `<i>code</i>`\n```html\n<script>document.title='owned'</script>\n```"
    )
    engine.reply = hostile
    ask(page, hostile)
    answered(page)
    answer = page.locator(".message.assistant .body")
    assert answer.locator("img, script, b, i").count() == 0
    expect(answer).to_contain_text("<img src=x onerror=")
    expect(answer.locator("strong")).to_have_text("<b>bold</b>")
    expect(answer.locator("p code")).to_have_text("<i>code</i>")
    expect(answer.locator("pre code")).to_have_text("<script>document.title='owned'</script>")
    expect(page.locator(".message.user .body")).to_have_text(hostile)
    assert "owned" not in page.title()


def test_markdown_becomes_nodes(page, engine):
    engine.reply = (
        "# Title\nSome *soft* and **strong** words, 2 * 3 * 4.\n\n- one\n- two\n  more\n\n"
        "3. three\n4. four\n\n```python\nprint('a')\n\n# b\n```\nEnd `x"
    )
    ask(page, "Show")
    answered(page)
    answer = page.locator(".message.assistant .body")
    expect(answer.locator("h3")).to_have_text("Title")
    expect(answer.locator("em")).to_have_text(["soft"])
    expect(answer.locator("strong")).to_have_text(["strong"])
    expect(answer.locator("ul li")).to_have_text(["one", "two\nmore"])
    expect(answer.locator("ol li")).to_have_text(["three", "four"])
    assert answer.locator("ol").get_attribute("start") == "3"
    assert answer.locator("pre code").inner_text() == "print('a')\n\n# b"
    expect(answer.locator(".code-head span")).to_have_text("python")
    expect(answer.locator("p").last).to_have_text("End `x")


def test_errors_are_shown_and_the_question_comes_back(page, engine, prompt_of):
    engine.fail_after = 0
    ask(page, "Hi")
    expect(page.get_by_role("alert")).to_have_text("out of pages")
    expect(page.get_by_label("Message")).to_have_value("Hi")
    engine.fail_after = None
    page.get_by_label("Message").press("Enter")
    answered(page, 2)
    assert prompt_of().count("<|im_start|>user") == 1


def test_an_error_amid_the_answer_keeps_what_came(page, engine):
    engine.fail_after = 5
    ask(page, "Hi")
    expect(page.get_by_role("alert")).to_have_text("out of pages")
    expect(page.locator(".message.assistant .body")).to_have_text("Hello")


def test_new_chat_forgets_and_aborts(page, engine, until, prompt_of):
    engine.reply = "y" * 900
    engine.step_s = 0.01
    ask(page, "secret")
    expect(page.locator(".message.assistant .body")).to_contain_text("yyy")
    page.get_by_role("button", name="New chat").click()
    until(lambda: len(engine.abandoned) == 1)
    expect(page.locator(".message")).to_have_count(0)
    expect(page.get_by_text("Ask the model something")).to_be_visible()
    engine.reply = "Hello"
    ask(page, "Hi")
    answered(page)
    assert "secret" not in prompt_of()


def test_every_control_has_a_name(page):
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea")]
            .filter((one) => !one.textContent.trim() && !one.labels?.length)
            .map((one) => one.id)"""
    )
    assert unnamed == []


@pytest.mark.parametrize(("scheme", "is_dark"), [("dark", True), ("light", False)])
def test_colours_follow_the_system(page, scheme, is_dark):
    page.emulate_media(color_scheme=scheme)
    colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    red = int(re.search(r"\d+", colour)[0])
    assert (red < 64) is is_dark


def test_a_server_with_a_key_asks_for_it_and_takes_it(browser: Browser, locked_live) -> None:
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    page.goto(locked_live.url)
    expect(page.locator("#model")).to_contain_text("needs an API key")
    ask(page, "Hi")
    expect(page.locator(".error")).to_contain_text("needs an API key")
    page.get_by_label("API key").fill("open sesame")
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#model")).to_have_text("org/tiny")
    ask(page, "Hi")
    expect(page.locator(".message.assistant .body").last).to_have_text("Hello, wörld!")
    context.close()
