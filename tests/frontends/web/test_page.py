"""The chat page in a headless Chromium: asking, stopping, settings, errors, colours, sizes."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Browser, expect

from tests.frontends.web.chromium import answered, ask, needs_chromium

pytestmark = needs_chromium


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
    expect(page.get_by_label("Message", exact=True)).to_have_value("")


def test_shift_enter_makes_a_line_and_the_conversation_is_kept(page, prompt_of):
    box = page.get_by_label("Message", exact=True)
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


# ---- settings ------------------------------------------------------------------------------------


def test_every_parameter_arrives(page, engine, prompt_of):
    expect(page.get_by_role("complementary", name="Settings")).to_be_visible()
    given = {
        "System prompt": "Be brief.",
        "Temperature": "0.25",
        "Top p": "0.8",
        "Top k": "7",
        "Min p": "0.05",
        "Repetition penalty": "1.1",
        "Frequency penalty": "0.5",
        "Presence penalty": "-0.5",
        "Max tokens": "5",
        "Seed": "11",
        "Stop texts, one per line": "zebra\nyak",
        "Other fields, as JSON": '{"min_tokens": 2}',
    }
    for label, value in given.items():
        page.get_by_label(label, exact=True).fill(value)
    ask(page, "Hi")
    answered(page)
    sampling = engine.submitted[0].options.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.25, 0.8, 7)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.05, 1.1)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -0.5)
    assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.seed) == (5, 2, 11)
    assert prompt_of().startswith("<|im_start|>system\nBe brief.<|im_end|>")
    expect(page.locator(".message.assistant .body")).to_have_text("Hello")
    expect(page.locator(".assistant .stats")).to_contain_text("cut off by the token limit")


def test_a_stop_text_ends_the_answer(page):
    page.get_by_label("Stop texts").fill("nothing like it\nwör")
    ask(page, "Hi")
    answered(page)
    expect(page.locator(".message.assistant .body")).to_have_text("Hello,")


def test_without_parameters_the_server_chooses(page, engine):
    ask(page, "Hi")
    answered(page)
    sampling = engine.submitted[0].options.sampling
    assert (sampling.temperature, sampling.seed, sampling.max_new_tokens) == (1.0, None, None)


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("Top p", "7"),
        ("Other fields, as JSON", "[1]"),
        ("Other fields, as JSON", '{"stream": false}'),
        ("Other fields, as JSON", "{"),
    ],
)
def test_an_impossible_parameter_is_not_sent(page, engine, label, value):
    page.get_by_label(label, exact=True).fill(value)
    ask(page, "Hi")
    expect(page.get_by_label(label, exact=True)).to_be_focused()
    expect(page.locator(".message")).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_have_value("Hi")
    assert engine.submitted == []
    page.get_by_label(label, exact=True).fill("")
    ask(page, "Hi")
    answered(page)


def test_parameters_are_kept_and_emptied(page):
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("System prompt").fill("Be kind.")
    page.get_by_label("System prompt").press("Tab")
    page.reload()
    expect(page.get_by_label("Temperature")).to_have_value("0.5")
    expect(page.get_by_label("System prompt")).to_have_value("Be kind.")
    page.get_by_role("button", name="Empty all").click()
    page.reload()
    expect(page.get_by_label("Temperature")).to_have_value("")


def test_presets_fill_the_system_prompt_and_can_be_made(page, prompt_of):
    page.get_by_label("Preset").select_option("Teacher")
    expect(page.get_by_label("System prompt")).to_have_value(re.compile("step by step"))
    page.get_by_label("System prompt").fill("You are a pirate.")
    page.get_by_text("Keep or delete a preset").click()
    page.get_by_label("Name", exact=True).fill("Pirate")
    page.get_by_role("button", name="Keep this system prompt").click()
    page.reload()
    page.get_by_label("Preset").select_option("Pirate")
    ask(page, "Hi")
    answered(page)
    assert prompt_of().startswith("<|im_start|>system\nYou are a pirate.<|im_end|>")
    page.get_by_text("Keep or delete a preset").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.reload()
    expect(page.get_by_label("Preset")).not_to_contain_text("Pirate")
    expect(page.get_by_label("Preset")).to_contain_text("Teacher")


def test_only_models_that_can_chat_are_offered_and_the_chosen_one_is_named(page):
    cards = [
        {"id": "writer"},
        {"id": "embedder", "is_generation": False},
        {"id": "org/tiny", "is_generation": True, "has_reasoning": True},
    ]
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": cards}))
    page.reload()
    expect(page.get_by_label("Model").locator("option")).to_have_text(["writer", "org/tiny"])
    expect(page.get_by_label("Thinking", exact=True)).to_be_hidden()
    page.get_by_label("Model").select_option("org/tiny")
    expect(page.get_by_label("Thinking", exact=True)).to_be_visible()
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "Hi")
    assert request.value.post_data_json["model"] == "org/tiny"
    answered(page)
    expect(page.locator(".assistant .who")).to_have_text("org/tiny")


def test_a_server_of_embeddings_alone_offers_nothing(page):
    cards = [{"id": "embedder", "is_generation": False}]
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": cards}))
    page.reload()
    expect(page.get_by_label("Model")).to_have_text("no model here can chat")


# ---- files ---------------------------------------------------------------------------------------


def test_text_files_go_along_in_a_fence_that_they_cannot_close(page, prompt_of):
    file = {"name": "a.md", "mimeType": "text/markdown", "buffer": "```\nwörd\n```".encode()}
    page.get_by_label("Files to attach").set_input_files([file])
    expect(page.locator("#attached li")).to_have_count(1)
    ask(page, "What is it?")
    answered(page)
    assert "File a.md:\n````\n```\nwörd\n```\n````\n\nWhat is it?<|im_end|>" in prompt_of()
    expect(page.locator("#attached")).to_be_hidden()
    page.get_by_text("File a.md").click()
    expect(page.locator(".file pre")).to_contain_text("wörd")


@pytest.mark.parametrize(
    ("name", "kind", "content", "why"),
    [
        ("photo.png", "image/png", b"\x89PNG", "this model takes text only, and this is an image"),
        ("song.ogg", "audio/ogg", b"OggS", "takes text and images, and this is audio"),
        ("data.bin", "", b"\xff\xfe\x00", "not a text file in UTF-8"),
        ("zero.txt", "text/plain", b"a\x00b", "not a text file in UTF-8"),
        ("long.txt", "text/plain", b"x" * 300_000, "it has 293 KB, and 256 KB is the limit"),
    ],
)
def test_other_files_are_refused_with_the_reason(page, name, kind, content, why):
    file = {"name": name, "mimeType": kind, "buffer": content}
    page.get_by_label("Files to attach").set_input_files([file])
    expect(page.locator(".notice")).to_contain_text(f"{name} was not attached: ")
    expect(page.locator(".notice")).to_contain_text(why)
    expect(page.locator("#attached")).to_be_hidden()


# ---- errors --------------------------------------------------------------------------------------


def test_an_error_is_shown_and_can_be_tried_again(page, engine, prompt_of):
    engine.fail_after = 0
    ask(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text("out of pages")
    engine.fail_after = None
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".message.assistant .body")).to_have_text("Hello, wörld!")
    expect(page.locator(".error")).to_have_count(0)
    expect(page.locator(".message")).to_have_count(2)
    assert prompt_of().count("<|im_start|>user") == 1


def test_after_an_error_another_question_can_be_asked(page, engine, prompt_of):
    """The one without an answer is not sent along, so that roles go on alternating."""
    engine.fail_after = 0
    ask(page, "First")
    expect(page.get_by_role("alert")).to_contain_text("out of pages")
    engine.fail_after = None
    ask(page, "Second")
    expect(page.locator(".message.assistant .body").last).to_have_text("Hello, wörld!")
    assert "First" not in prompt_of()


def test_an_error_amid_the_answer_keeps_what_came(page, engine):
    engine.fail_after = 5
    ask(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text("out of pages")
    expect(page.locator(".message.assistant .body")).to_have_text("Hello")


def test_the_message_of_a_refused_request_is_shown(page):
    page.get_by_label("Other fields").fill('{"temperature": -1}')
    ask(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text("temperature is -1")


def test_a_server_that_is_gone_is_said(page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".message.assistant .body")).to_have_text("Hello, wörld!")


def test_a_connection_that_is_lost_amid_the_answer_keeps_what_came(page):
    chunk = {"choices": [{"index": 0, "delta": {"content": "Half an ans"}}]}
    body = f"data: {json.dumps(chunk)}\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=body),
    )
    ask(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text("The connection was lost")
    expect(page.locator(".message.assistant .body")).to_have_text("Half an ans")
    expect(page.get_by_role("button", name="Continue")).to_be_visible()


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
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".message.assistant .body").last).to_have_text("Hello, wörld!")
    context.close()


# ---- for everybody -------------------------------------------------------------------------------


def test_every_control_has_a_name(page):
    ask(page, "Hi")
    answered(page)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select, summary")]
            .filter((one) => !one.textContent.trim() && !one.labels?.length && !one.ariaLabel)
            .map((one) => one.outerHTML)"""
    )
    assert unnamed == []


def test_the_page_works_by_keyboard(page, engine):
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("apples")
    page.keyboard.press("Enter")
    answered(page)
    page.keyboard.press("Control+Shift+O")
    expect(page.locator(".message")).to_have_count(0)
    page.keyboard.press("Control+k")
    page.keyboard.type("apple")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    answered(page)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_an_answer_is_announced_when_it_is_complete(page, engine):
    engine.hold_after = 3
    ask(page, "Hi")
    expect(page.locator(".message.assistant .body")).to_contain_text("Hel")
    assert page.get_by_role("log").get_attribute("aria-live") == "polite"
    assert page.locator(".message.assistant").get_attribute("aria-busy") == "true"
    engine.hold_after = None
    answered(page)
    assert page.locator(".message.assistant").get_attribute("aria-busy") == "false"


@pytest.mark.parametrize(("scheme", "is_dark"), [("dark", True), ("light", False)])
def test_colours_follow_the_system_or_the_switch(page, scheme, is_dark):
    page.emulate_media(color_scheme=scheme)
    assert (brightness(page) < 64) is is_dark
    page.get_by_label("Colours").select_option("light" if is_dark else "dark")
    assert (brightness(page) < 64) is not is_dark
    page.reload()
    assert (brightness(page) < 64) is not is_dark
    page.get_by_label("Colours").select_option("As the system")
    assert (brightness(page) < 64) is is_dark


def brightness(page) -> int:
    colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    return int(re.search(r"\d+", colour)[0])


def test_it_fits_a_phone(page, engine):
    engine.reply = (
        f"| {'a | ' * 20}\n|{'---|' * 20}\n| {'word | ' * 20}\n\n```\n{'long ' * 60}\n```"
    )
    page.set_viewport_size({"width": 360, "height": 640})
    page.reload()
    for name in ("Settings", "History"):
        expect(page.locator(f"#{name.lower()}")).to_be_hidden()
    ask(page, "x" * 200)
    answered(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    for name in ("Settings", "History"):
        page.get_by_role("button", name=name).click()
        expect(page.locator(f"#{name.lower()}")).to_be_visible()
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    page.keyboard.press("Escape")
    expect(page.locator("#history")).to_be_hidden()
    expect(page.get_by_role("button", name="History")).to_be_focused()


def test_the_live_page_is_a_link_away(page, live):
    page.get_by_role("link", name="Live page").click()
    expect(page).to_have_url(f"{live.url}/dashboard")
