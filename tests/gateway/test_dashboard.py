"""The gateway's live page, its figures, and the page in a headless Chromium."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import expect

from tests.frontends.web.chromium import chromium, needs_chromium, watched
from tests.gateway.stubs import Bench, Stub, bench

LONG = "x" * 400


def test_figures() -> None:
    async def run() -> None:
        good, bad = Stub("good"), Stub("bad")
        bad.behaviour = 400
        async with bench(good, bad, policy="cache_aware", cb_failure_threshold=1) as made:
            for _ in range(3):
                await made.post(prompt=LONG)
            figures = (await made.client.get("/dashboard/figures")).json()
            assert (figures["policy"], figures["num_ready"]) == ("cache_aware", 2)
            assert (figures["num_open"], figures["num_waiting"]) == (0, 0)
            assert figures["num_answers"] == 3
            # The first of three equal prompts was new.
            assert figures["known_bytes"] * 3 == figures["prompt_bytes"] * 2 > 2 * len(LONG)
            assert [worker["url"] for worker in figures["workers"]] == [good.url, bad.url]
            bad.behaviour = good.behaviour = 500
            await made.post(prompt=LONG)
            figures = (await made.client.get("/dashboard/figures")).json()
            assert [worker["num_failures"] for worker in figures["workers"]] == [1, 1]
            assert {worker["circuit_breaker"] for worker in figures["workers"]} == {"open"}
            assert all("500" in worker["last_error"] for worker in figures["workers"])

    asyncio.run(run())


def test_a_policy_that_looks_at_no_prefixes() -> None:
    async def run() -> None:
        async with bench(Stub("a")) as made:
            await made.post(prompt=LONG)
            assert (await made.client.get("/dashboard/figures")).json()["known_bytes"] is None

    asyncio.run(run())


def test_figures_are_for_those_who_steer_and_the_page_for_all() -> None:
    async def run() -> None:
        async with bench(Stub("a"), api_key="user", admin_api_key="admin") as made:
            user = {"authorization": "Bearer user"}
            told = await made.client.get("/dashboard/figures", headers=user)
            assert told.status_code == 403
            for path in ("/dashboard", "/web/workers.js", "/web/units.js", "/favicon.svg"):
                told = await made.client.get(path)
                assert told.status_code == 200
                assert "script-src 'self'" in told.headers["content-security-policy"]

    asyncio.run(run())


@contextmanager
def in_thread(*stubs: Stub, **options: object) -> Iterator[Bench]:
    """A gateway in a loop of its own: the browser's calls block."""
    ready, ended = threading.Event(), asyncio.Event()
    made: list[Bench] = []
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with bench(*stubs, **options) as one:
            made.append(one)
            ready.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(60)
        yield made[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


@needs_chromium
def test_the_page() -> None:
    stub = Stub("a")
    with in_thread(stub, policy="cache_aware", admin_api_key="secret") as made, chromium() as one:
        context = one.new_context()
        with watched(context, made.url) as page:
            page.goto(f"{made.url}/dashboard")
            expect(page.locator("#state")).to_have_text("locked")
            page.get_by_label("This gateway asks for its admin key").fill("secret")
            page.get_by_role("button", name="Show").click()
            expect(page.locator("#state")).to_have_text("ready")
            expect(page.locator("#policy")).to_have_text("cache_aware")
            expect(page.locator("#ready-note")).to_have_text("of 1 ready")
            for _ in range(2):
                page.request.post(f"{made.url}/v1/completions", data={"model": "m", "prompt": LONG})
            expect(page.locator("#hit-rate")).to_have_text("50%")
            cells = page.locator("#worker-rows td")
            expect(cells.nth(0)).to_have_text(stub.url)
            expect(cells.nth(1)).to_have_text("ready")
            expect(cells.nth(2)).to_have_text("closed")
            expect(cells.nth(5)).to_have_text("2")
            page.request.delete(
                f"{made.url}/workers/{made.worker(stub).id}",
                headers={"authorization": "Bearer secret"},
            )
            expect(page.locator("#no-workers")).to_be_visible()
            expect(page.locator("#state.failing")).to_have_text("no worker is ready")
        context.close()
