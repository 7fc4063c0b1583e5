"""The live page in a headless Chromium, over an engine that answers from a script."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from sapwood.frontends.serving.engine_figures import EngineFigures
from sapwood.observe.engine_facts import EngineConstants, PoolConstants
from sapwood.observe.history import Sample
from sapwood.observe.metrics import Metrics
from sapwood.observe.requests import RequestObserver
from sapwood.schema.output import PoolFacts
from tests.frontends.web.chromium import needs_chromium, watched

pytestmark = needs_chromium

NOW_S = 1_800_000_000.0

CONSTANTS = EngineConstants(
    page_size=16,
    max_total_tokens=32768,
    max_running_requests=64,
    startup_s=2.0,
    load_s=1.0,
    weight_bytes=143_000_000,
    pools=(PoolConstants(name="full", size=2048, unit_bytes=368_640),),
)


def sample(age_s: int) -> Sample:
    """A busy server, some waves of it."""
    wave = math.sin(age_s / 25) + 0.4 * math.sin(age_s / 7)
    running = round(18 + 10 * wave)
    return Sample(
        at_s=NOW_S - age_s,
        num_running=running,
        num_waiting=max(0, round(8 * wave - 4)),
        output_tokens_per_s=900 + 160 * wave,
        prompt_tokens_per_s=max(0.0, 500 + 400 * math.sin(age_s / 11)),
        cache_hit_rate=None if age_s % 50 < 4 else 0.55 + 0.2 * math.sin(age_s / 40),
        token_usage=0.45 + 0.15 * wave,
        ttft_s=[0.012 + 0.002 * wave, 0.055 + 0.012 * wave, 0.11 + 0.03 * wave],
        itl_s=[0.019 + 0.002 * wave, 0.027 + 0.004 * wave, 0.041 + 0.008 * wave],
    )


@pytest.fixture
def services(services, engine):
    """With five minutes of history."""
    observer = RequestObserver(Metrics("org/tiny"))
    figures = EngineFigures([engine], observer)
    for age_s in range(299, -1, -1):
        figures.history.add(sample(age_s))
    series = observer.metrics.series(())
    series.num_requests, series.num_finished = 12480, 12391
    series.num_aborted, series.num_refused, series.num_open = 58, 11, 20
    engine.figures = {
        "num_pages": 2048,
        "num_leased_pages": 900,
        "num_free_pages": 500,
        "resident_bytes": 812_000_000,
        "num_steps": 9,
    }
    started = int(time.time()) - 4 * 3600
    return replace(services, observer=observer, figures=figures, created=started)


@pytest.fixture
def page(context: BrowserContext, live, services) -> Iterator[Page]:
    # Whoever runs the figures has asked the engine by now; a scripted one has no memory.
    httpx.get(f"{live.url}/v1/loads").raise_for_status()
    services.observer.metrics.engine.constants = CONSTANTS
    with watched(context, live.url) as page:
        page.set_viewport_size({"width": 1200, "height": 900})
        page.goto(f"{live.url}/dashboard")
        expect(page.locator("#model")).to_have_text("org/tiny")
        yield page


def test_the_figures_of_now_are_shown(page):
    latest = sample(0)
    expect(page.locator("#running")).to_have_text(str(latest.num_running))
    expect(page.locator("#waiting")).to_have_text(str(latest.num_waiting))
    expect(page.locator("#output-rate")).to_have_text("900")
    expect(page.locator("#hit-rate")).to_have_text("57%")
    expect(page.locator("#usage")).to_have_text("45%")
    expect(page.locator("#state")).to_have_text("ready")
    assert page.locator("#totals").inner_text().split() == ["12,480", "12,391", "58", "11", "20"]


def test_charts_have_a_line_per_quantity_and_say_their_values(page):
    for name, count in (("requests", 2), ("tokens", 2), ("ttft", 3), ("itl", 3), ("cache", 2)):
        paths = page.locator(f"#chart-{name} path")
        expect(paths).to_have_count(count)
        for i in range(count):
            assert paths.nth(i).get_attribute("d").count("L") > 200
    legend = page.locator("#chart-ttft .legend")
    expect(legend).to_have_text(re.compile(r"p50 12 ms\s*p95 55 ms\s*p99 110 ms"))
    expect(page.locator("#chart-itl svg")).to_have_attribute(
        "aria-label", "Time between tokens: p50 19 ms, p95 27 ms, p99 41 ms"
    )


def test_where_there_was_no_prompt_there_is_a_gap(page):
    path = page.locator("#chart-cache path").first.get_attribute("d")
    assert path.count("M") == 6


def test_pointing_at_a_chart_tells_the_values_there(page):
    box = page.locator("#chart-requests svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 20)
    cursor = page.locator("#chart-requests line.cursor")
    expect(cursor).to_have_attribute("visibility", "visible")
    left = 46 / 480
    age_s = round(300 * (1 - (0.5 - left) / (1 - left)))
    shown = int(page.locator("#chart-requests .legend b").first.inner_text())
    assert shown in {sample(age).num_running for age in (age_s - 1, age_s, age_s + 1)}
    page.mouse.move(0, 0)
    expect(cursor).to_have_attribute("visibility", "hidden")


def test_memory_has_its_owners(page):
    rows = page.locator("#memory-rows tr")
    expect(rows).to_have_count(6)
    texts = [" ".join(row.split()) for row in rows.all_inner_texts()]
    assert texts[0] == "KV of running requests 332 MB"
    assert texts[1] == "KV of the prefix cache 239 MB"
    assert texts[2] == "KV, free 184 MB"
    assert texts[4].startswith("resident, api process")
    assert texts[5] == "resident, engine process 812 MB"
    widths = page.locator("#memory-bar div").evaluate_all(
        "all => all.map((one) => one.clientWidth)"
    )
    assert widths[0] > widths[1] > widths[2]


def test_memory_of_each_pool(page, live, engine):
    engine.more_pools = (PoolFacts(name="window_1024", size=100, unit_bytes=1_000_000),)
    httpx.get(f"{live.url}/v1/loads").raise_for_status()
    rows = page.locator("#memory-rows tr")
    expect(rows.filter(has_text="windows of 1024, in use and kept")).to_have_count(1)
    expect(rows.filter(has_text="all tokens, in use and kept")).to_have_count(1)


def test_new_samples_arrive_by_themselves(page, services):
    services.figures.history.add(replace(sample(0), at_s=NOW_S + 1, num_running=77))
    expect(page.locator("#running")).to_have_text("77")


def test_a_restarted_server_begins_anew(page, services):
    services.figures.history._num_added = 1
    services.figures.history._samples.clear()
    services.figures.history._samples.append(replace(sample(0), num_running=1))
    page.wait_for_timeout(1200)
    services.figures.history.add(replace(sample(0), at_s=NOW_S + 5, num_running=5))
    expect(page.locator("#running")).to_have_text("5")


def test_an_engine_that_is_gone_is_said(page, engine):
    engine.unavailable_reason = "the engine process was ended by signal SIGKILL"
    expect(page.locator("#state")).to_have_text(engine.unavailable_reason)
    expect(page.locator("#state.failing")).to_be_visible()


def test_a_server_that_is_gone_is_said(page):
    page.route("**/dashboard/figures*", lambda route: route.abort())
    expect(page.locator("#state")).to_have_text("no connection")
    page.unroute("**/dashboard/figures*")
    expect(page.locator("#state")).to_have_text("ready")


def test_a_key_is_asked_for_and_sent(page, live):
    sent = []

    def guarded(route, request) -> None:
        sent.append(request.headers.get("authorization"))
        if sent[-1] == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=401, body=json.dumps({"error": {}}))

    page.route("**/dashboard/figures*", guarded)
    page.reload()
    expect(page.locator("#state")).to_have_text("locked")
    page.get_by_label("This server asks for its API key").fill("secret")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#key-form")).to_be_hidden()
    assert sent[0] is None


@pytest.mark.parametrize(("scheme", "is_dark"), [("dark", True), ("light", False)])
def test_colours_follow_the_system(page, scheme, is_dark):
    page.emulate_media(color_scheme=scheme)
    script = "(name) => getComputedStyle(document.querySelector(name)).backgroundColor"
    for name in ("body", ".tile", "figure"):
        red = int(re.search(r"\d+", page.evaluate(script, name))[0])
        assert (red < 64) is is_dark


def test_it_fits_a_narrow_screen(page):
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 380
