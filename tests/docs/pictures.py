"""Takes the pictures of the pages in docs/images, of a real server under a real load.

    python -m tests.docs.pictures [--seconds 330] [--to docs/images]

A server of the default model is started on a free port; a headless Chromium looks at its pages.
`make pictures` does the same on a fresh machine.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.server import serving
from tests.frontends.web.test_page import CHROMIUM, FLAGS

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

QUESTIONS = ("What is sapwood in a tree?", "Write a Python function that reverses a string.")
ANSWER_LIMIT_S = 120.0
CHARTS = ("requests", "tokens", "ttft", "itl", "cache")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.docs.pictures")
    parser.add_argument("--seconds", type=float, default=HISTORY_S + 30.0, help="of load")
    parser.add_argument("--to", type=Path, default=IMAGES, help="directory of the pictures")
    asked = parser.parse_args(arguments)
    if CHROMIUM is None:
        parser.error("there is no chromium on the path")
    with serving(*SERVER) as server, browser() as chromium:
        take_chat(chromium, server.url, asked.to / "chat.png")
        take_dashboard(chromium, server.url, asked.to / "dashboard.png", seconds=asked.seconds)
    return 0


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def take_chat(chromium: Browser, url: str, path: Path) -> None:
    """A conversation of two turns, and the settings beside it."""
    page = chromium.new_page(viewport={"width": 1200, "height": 836})
    page.goto(url)
    expect(page.locator("#model")).not_to_be_empty()
    if not page.locator("#settings").is_visible():
        page.locator("#toggle-settings").click()
    page.get_by_label("System prompt").fill("You are a helpful assistant. Answer briefly.")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("150")
    for number, question in enumerate(QUESTIONS, 1):
        page.get_by_label("Message").fill(question)
        page.get_by_label("Message").press("Enter")
        answers = page.locator(".message.assistant:not(.busy)")
        expect(answers).to_have_count(number, timeout=ANSWER_LIMIT_S * 1000)
    _shoot(page, path)


def take_dashboard(chromium: Browser, url: str, path: Path, *, seconds: float) -> None:
    """The live page after so many seconds of load, and while it goes on."""
    with load(url, seconds=seconds):
        page = chromium.new_page(viewport={"width": 1200, "height": 900})
        page.goto(f"{url}/dashboard")
        for chart in CHARTS:
            lines = page.locator(f"#chart-{chart} path").first
            expect(lines).to_have_attribute("d", re.compile("L"))
        _shoot(page, path)


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
    page.close()


if __name__ == "__main__":
    sys.exit(main())
