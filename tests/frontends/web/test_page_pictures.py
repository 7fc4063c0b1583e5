"""Pictures on the chat page in a headless Chromium: attached, dropped, pasted, kept, sent."""

from __future__ import annotations

import base64
import json

import pytest
from playwright.sync_api import expect

from tests.frontends.web.chromium import ask, needs_chromium
from tests.pictures import picture, png

pytestmark = needs_chromium

PNG = png(picture(6, 4))
PICTURE = {"name": "dog.png", "mimeType": "image/png", "buffer": PNG}


@pytest.fixture
def seeing(page):
    """The page of a model that sees; the bodies of its requests."""
    card = {"id": "seer", "is_generation": True, "media": ["image", "video"]}
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [card]}))
    bodies = []

    def answer(route):
        bodies.append(route.request.post_data_json)
        chunk = {"choices": [{"index": 0, "delta": {"content": "a dog"}, "finish_reason": "stop"}]}
        text = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        route.fulfill(body=text, content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)
    page.reload()
    expect(page.get_by_label("Model")).to_have_text("seer")
    return bodies


def test_a_picture_goes_along_and_stays_in_the_chat(page, seeing):
    page.get_by_label("Files to attach").set_input_files([PICTURE])
    expect(page.locator("#attached img.thumbnail")).to_have_count(1)
    ask(page, "What is it?")
    expect(page.locator(".message.assistant .body")).to_have_text("a dog")
    shown = {"url": f"data:image/png;base64,{base64.b64encode(PNG).decode()}"}
    parts = [
        {"type": "image_url", "image_url": shown},
        {"type": "text", "text": "What is it?"},
    ]
    assert seeing[0]["messages"] == [{"role": "user", "content": parts}]
    expect(page.locator("#attached")).to_be_hidden()
    # The next question still shows it, also after the page was closed and opened again.
    page.reload()
    expect(page.locator(".message.user img.thumbnail")).to_have_count(1)
    ask(page, "And how old?")
    expect(page.locator(".message.assistant .body")).to_have_count(2)
    assert seeing[1]["messages"][0]["content"] == parts
    assert seeing[1]["messages"][2]["content"] == "And how old?"
    page.get_by_text("Image dog.png").click()
    expect(page.locator(".message.user img.whole")).to_be_visible()


GIVE = """([name, data]) => {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const given = new DataTransfer();
    given.items.add(new File([bytes], "given.png", { type: "image/png" }));
    const options = { bubbles: true, cancelable: true };
    const event = name === "drop"
        ? new DragEvent("drop", { ...options, dataTransfer: given })
        : new ClipboardEvent("paste", { ...options, clipboardData: given });
    document.getElementById("prompt").dispatchEvent(event);
}"""


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_pictures_are_dropped_and_pasted(page, seeing, way):
    page.evaluate(GIVE, [way, base64.b64encode(PNG).decode()])
    expect(page.locator("#attached img.thumbnail")).to_have_count(1)
    page.get_by_label("Remove given.png").click()
    expect(page.locator("#attached")).to_be_hidden()


def test_a_large_picture_is_made_smaller(page, seeing):
    draw = """async () => {
        const canvas = new OffscreenCanvas(3200, 800);
        canvas.getContext("2d").fillRect(0, 0, 9, 9);
        const blob = await canvas.convertToBlob({ type: "image/png" });
        const given = new DataTransfer();
        given.items.add(new File([blob], "wide.png", { type: "image/png" }));
        const options = { bubbles: true, cancelable: true, clipboardData: given };
        document.getElementById("prompt").dispatchEvent(new ClipboardEvent("paste", options));
    }"""
    page.evaluate(draw)
    expect(page.locator("#attached img.thumbnail")).to_have_count(1)
    ask(page, "")
    expect(page.locator(".message.assistant .body")).to_have_text("a dog")
    [part] = seeing[0]["messages"][0]["content"]
    assert part["image_url"]["url"].startswith("data:image/jpeg;base64,")
    size = page.evaluate(
        "() => { const i = document.querySelector('img.whole'); "
        "return i.decode().then(() => [i.naturalWidth, i.naturalHeight]); }"
    )
    assert size == [1600, 400]


def test_what_is_no_picture_is_not_attached(page, seeing):
    file = {"name": "dog.png", "mimeType": "image/png", "buffer": b"no picture"}
    page.get_by_label("Files to attach").set_input_files([file])
    expect(page.locator(".notice")).to_contain_text("no image that this browser can read")
    expect(page.locator("#attached")).to_be_hidden()
