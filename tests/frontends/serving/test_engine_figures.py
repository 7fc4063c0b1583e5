import asyncio

import pytest

from sapwood.frontends.serving import engine_figures
from sapwood.frontends.serving.engine_figures import EngineFigures
from sapwood.observe.metrics import Metrics
from sapwood.observe.requests import RequestObserver

TOTALS = {"num_steps": 10, "num_output_tokens": 100, "num_prefill_tokens": 50}


@pytest.fixture
def observer():
    return RequestObserver(Metrics("m"))


def test_rates_are_of_the_interval_between_two_answers(engine, observer, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    figures = EngineFigures([engine], observer)

    async def run() -> None:
        engine.figures = dict(TOTALS)
        assert await figures.refresh()
        now[0] += 2.0
        engine.figures = {
            "num_steps": 20,
            "num_output_tokens": 300,
            "num_prefill_tokens": 110,
            "num_cached_tokens": 60,
        }
        assert await figures.refresh()
        rates = observer.metrics.engine.rates
        assert rates.output_tokens_per_s == 100
        assert rates.prompt_tokens_per_s == 30
        assert rates.cache_hit_rate == 0.5
        now[0] += 0.1  # too short for a rate of its own
        engine.figures["num_output_tokens"] = 1000
        await figures.refresh()
        assert observer.metrics.engine.rates.output_tokens_per_s == 100
        now[0] += 1.9  # what came after the last rate counts in this one
        await figures.refresh()
        assert observer.metrics.engine.rates.output_tokens_per_s == 350
        now[0] += 1.0
        await figures.refresh()
        rates = observer.metrics.engine.rates
        assert (rates.output_tokens_per_s, rates.last_output_tokens_per_s) == (0, 350)

    asyncio.run(run())


def test_an_engine_that_was_started_anew_gives_no_negative_rates(engine, observer, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    figures = EngineFigures([engine], observer)

    async def run() -> None:
        engine.figures = dict(TOTALS)
        await figures.refresh()
        now[0] += 5
        engine.figures = {"num_steps": 1}
        await figures.refresh()
        assert observer.metrics.engine.rates.output_tokens_per_s == 0

    asyncio.run(run())


def test_a_young_answer_is_told_again(engine, observer):
    figures = EngineFigures([engine], observer)

    async def run() -> None:
        await figures.refresh()
        engine.figures = {"num_waiting": 5}
        assert await figures.refresh(max_age_s=60)
        assert figures.status.num_waiting == 0
        await figures.refresh()
        assert figures.status.num_waiting == 5

    asyncio.run(run())


def test_a_busy_engine_is_asked_once_and_the_old_figures_stay(engine, observer, monkeypatch):
    monkeypatch.setattr(engine_figures, "PATIENCE_S", 0.02)
    figures = EngineFigures([engine], observer)
    answer = engine.status
    num_asked = 0

    async def run() -> None:
        nonlocal num_asked
        assert await figures.refresh()
        go_on = asyncio.Event()

        async def slow():
            nonlocal num_asked
            num_asked += 1
            await go_on.wait()
            return await answer()

        engine.status = slow
        assert not await figures.refresh()
        assert not await figures.refresh()
        assert num_asked == 1
        assert figures.status is not None
        go_on.set()
        assert await figures.refresh()
        assert num_asked == 1

    asyncio.run(run())


def test_while_it_runs_the_history_grows(engine, observer, monkeypatch):
    monkeypatch.setattr(engine_figures, "INTERVAL_S", 0.01)
    figures = EngineFigures([engine], observer)
    engine.figures = {"num_running": 3, "num_pages": 10, "num_leased_pages": 5}

    async def run() -> None:
        task = asyncio.create_task(figures.run())
        while figures.history.num_added < 3:
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    sample = figures.history.since(0)[0]
    assert (sample.num_running, sample.token_usage) == (3, 0.5)
    assert sample.ttft_s == [None, None, None]


def test_an_engine_that_is_gone_is_survived(engine, observer):
    from sapwood.base.errors import EngineUnavailable

    async def gone():
        raise EngineUnavailable("it died")

    engine.status = gone
    figures = EngineFigures([engine], observer)
    assert asyncio.run(figures.refresh()) is False
    assert figures.status is None
