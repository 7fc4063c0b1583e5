"""Takes the pictures of the pages in docs/images, of a real server under a real load.

    python -m tests.docs.pictures [--seconds 330] [--to docs/images]

A server of the default model is started on a free port; a headless Chromium looks at its pages.
`make pictures` does the same on a fresh machine.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Page, expect

from tests.e2e.server import serving
from tests.frontends.web.chromium import CHROMIUM, ask, chromium

IMAGES = Path(__file__).parents[2] / "docs" / "images"

SERVER = ("--max-total-tokens", "16384", "--max-running-requests", "24")
"""A pool and a batch of which the load makes use."""

RATE = 0.6
STEADY = ("--workload", "random", "--request-rate", str(RATE))
STEADY += ("--prompt-tokens", "256", "--output-tokens", "128")
"""Requests of random lengths that come one by one, in a Poisson process."""

BURST = ("--workload", "shared-prefix", "--prefix-groups", "4", "--requests-per-group", "8")
BURST += ("--prefix-tokens", "384", "--suffix-tokens", "32", "--output-tokens", "48")
"""32 requests at once, 8 on each of 4 prefixes; others of them every BURST_INTERVAL_S."""

BURST_INTERVAL_S = 60.0
HISTORY_S = 300
"""What the live page keeps."""

TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
<think>
{% endif -%}
"""
"""The model was not trained to think, but goes on if somebody begins; the server ends it."""

SETTINGS = {
    "System prompt": "You are a helpful assistant. Answer briefly.",
    "Temperature": "0",
    "Repetition penalty": "1.05",
    "Max tokens": "160",
    "Thinking tokens": "30",
}
QUESTION = "What is sapwood in a tree?"
TABLE_QUESTION = (
    "Oaks grow to 30 m, birches to 25 m and yews to 15 m. Show this as a Markdown table. Then show "
    "the heights as a Python dictionary and print the tallest tree."
)
TABLE_SHAPE = (
    r"\| Tree \| Height \|\n\|---\|---:\|\n(\| (Oak|Birch|Yew) \| [1-9][0-9] m \|\n){3}"
    r"\n[A-Z][a-z ]+:\n\n```python\nheights = \{(\"[A-Z][a-z]+\": [1-9][0-9](, )?){3}\}\n"
    r"[^\n`]+\n```\n"
)
"""Such a small model keeps to a table and to code only if a regex holds it to them."""

OTHER_QUESTIONS = (
    "Name three trees.",
    "Why do leaves turn red?",
    "What is the capital of Japan?",
    "How old can an oak tree become?",
)
SEARCHED = "tree"
ANSWER_LIMIT_S = 120.0
CHARTS = ("requests", "tokens", "ttft", "itl", "cache")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.docs.pictures")
    parser.add_argument("--seconds", type=float, default=HISTORY_S + 30.0, help="of load")
    parser.add_argument("--to", type=Path, default=IMAGES, help="directory of the pictures")
    asked = parser.parse_args(arguments)
    if CHROMIUM is None:
        parser.error("there is no chromium on the path")
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template.jinja"
        template.write_text(TEMPLATE, "utf-8")
        flags = (*SERVER, "--chat-template", str(template), "--reasoning-parser", "qwen3")
        with serving(*flags) as server, chromium() as browser:
            take_chat(browser, server.url, asked.to)
            path = asked.to / "dashboard.png"
            take_dashboard(browser, server.url, path, seconds=asked.seconds)
    return 0


def take_chat(browser: Browser, url: str, folder: Path) -> None:
    """A conversation with thinking, a table and code: light, dark, on a phone; then the history."""
    # The first grammar starts the process that tries grammars; no answer should wait for that.
    warm_up = {"prompt": "a", "max_tokens": 1, "regex": "a"}
    httpx.post(f"{url}/v1/completions", json=warm_up, timeout=ANSWER_LIMIT_S).raise_for_status()
    page = browser.new_page(viewport={"width": 1200, "height": 1240})
    page.goto(url)
    expect(page.locator("#model")).not_to_have_text("not ready")
    for label, value in SETTINGS.items():
        page.get_by_label(label, exact=True).fill(value)
    _ask(page, QUESTION)
    page.locator(".thinking summary").click()
    shape = json.dumps({"regex": TABLE_SHAPE})
    page.get_by_label("Other fields, as JSON").fill(shape)
    _ask(page, TABLE_QUESTION)
    expect(page.locator(".message.assistant table")).to_be_visible()
    expect(page.locator(".message.assistant .body .hljs-number").first).to_be_visible()
    page.get_by_label("Other fields, as JSON").fill("")
    page.locator("#settings").evaluate("one => (one.scrollTop = 0)")
    page.get_by_label("Message", exact=True).focus()
    _shoot(page, folder / "chat.png")
    page.emulate_media(color_scheme="dark")
    _shoot(page, folder / "chat-dark.png")
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 390, "height": 844})
    expect(page.locator("#settings")).to_be_hidden()
    page.locator("#conversation").evaluate("one => (one.scrollTop = one.scrollHeight)")
    _shoot(page, folder / "chat-phone.png")
    page.set_viewport_size({"width": 1200, "height": 800})
    expect(page.locator("#settings")).to_be_visible()
    page.get_by_label("Max tokens").fill("48")
    page.get_by_label("Thinking tokens").fill("8")
    for question in OTHER_QUESTIONS:
        page.get_by_role("button", name="New chat").click()
        _ask(page, question)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name=QUESTION, exact=True).click()
    page.get_by_label("Search").fill(SEARCHED)
    page.get_by_role("button", name="More about").last.click()
    _shoot(page, folder / "chat-history.png")
    page.close()


def _ask(page: Page, question: str) -> None:
    """And wait for the answer, which must not be an error."""
    number = page.locator(".message.assistant").count() + 1
    ask(page, question)
    answers = page.locator(".message.assistant:not(.busy)")
    expect(answers).to_have_count(number, timeout=ANSWER_LIMIT_S * 1000)


def take_dashboard(browser: Browser, url: str, path: Path, *, seconds: float) -> None:
    """The live page after so many seconds of load, and while it goes on."""
    with load(url, seconds=seconds):
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(f"{url}/dashboard")
        for chart in CHARTS:
            lines = page.locator(f"#chart-{chart} path").first
            expect(lines).to_have_attribute("d", re.compile("L"))
        _shoot(page, path)
        page.close()


@contextmanager
def load(url: str, *, seconds: float) -> Iterator[None]:
    """Yields after so many seconds; RuntimeError if a part of the load has failed by then."""
    with tempfile.TemporaryDirectory() as results:
        parts: list[subprocess.Popen[bytes]] = []

        def start(*workload: str) -> None:
            command = [sys.executable, "-m", "sapwood", "bench", "serve", "--url", url, *workload]
            command += ["--seed", str(len(parts)), "--num-warmups", "0", "--output-dir", results]
            parts.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))

        try:
            # Twice as many requests as will come in that time.
            num_requests = round(2 * seconds * RATE) + 10
            start(*STEADY, "--num-requests", str(num_requests))
            now = time.monotonic()
            end, next_burst = now + seconds, now + min(BURST_INTERVAL_S, seconds) / 2
            while now < end:
                if now >= next_burst:
                    start(*BURST)
                    next_burst += BURST_INTERVAL_S
                time.sleep(0.2)
                now = time.monotonic()
            failed = [" ".join(part.args) for part in parts if part.poll() not in (None, 0)]
            if failed or parts[0].poll() is not None:
                raise RuntimeError(f"the load did not go on: {failed or 'too few requests'}")
            yield
        finally:
            for part in parts:
                part.terminate()
                part.wait()


def _shoot(page: Page, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path, full_page=True)


if __name__ == "__main__":
    sys.exit(main())
