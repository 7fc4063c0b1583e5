from dataclasses import replace

import pytest

from sapwood.bench.distribution import Spread
from sapwood.bench.plots import (
    output_rates,
    plot_ratios,
    plot_repeats,
    plot_serving,
    plot_shares,
)
from sapwood.bench.timeline import RequestTimeline
from tests.bench.images import num_colours

TIMELINE = RequestTimeline(
    index=0,
    asked_prompt_tokens=10,
    asked_output_tokens=8,
    sent_s=0.0,
    token_s=(0.5, 1.5, 3.5, 3.9),
    end_s=4.0,
    num_prompt_tokens=10,
    num_output_tokens=8,
    num_cached_tokens=0,
    counted_by_server=True,
    finish="length",
    error=None,
)


@pytest.mark.parametrize("timelines", [[TIMELINE], [TIMELINE, replace(TIMELINE, error="failed")]])
def test_a_serving_run_is_drawn(tmp_path, timelines):
    path = tmp_path / "serving.png"
    plot_serving(timelines, "a title", path)
    assert num_colours(path) == 1


def test_a_run_of_failures_is_drawn_without_bars(tmp_path):
    path = tmp_path / "serving.png"
    plot_serving([replace(TIMELINE, error="x")], "a title", path)
    assert num_colours(path) == 0


def test_throughput_over_time_keeps_every_token():
    starts_s, rates, width_s = output_rates([TIMELINE])
    assert width_s == pytest.approx(0.4)
    assert len(starts_s) == 10
    assert sum(rate * width_s for rate in rates) == pytest.approx(8)
    # Four events for eight tokens: the one at 0.5 s is two tokens in the second span.
    assert rates[1] == pytest.approx(2 / 0.4)
    assert rates[0] == 0


def test_long_runs_have_bounded_spans():
    starts_s, rates, width_s = output_rates([replace(TIMELINE, end_s=3600.0)])
    assert len(starts_s) == len(rates) == 120
    assert width_s == 30.0


def test_repeats_are_drawn(tmp_path):
    path = tmp_path / "offline.png"
    figures = {"a": ("decode (tok/s)", [10.0, 11.0, 9.0]), "d": ("wall (s)", [3.0])}
    plot_repeats(figures, "offline", path)
    assert num_colours(path) == 1


def test_ratios_are_drawn_in_a_colour_per_peer(tmp_path):
    path = tmp_path / "peers.png"
    spread = Spread.of([2.0, 2.5, 1.5])
    plot_ratios({"sapwood": {"a": spread, "b": spread}, "other": {"b": spread}}, "other", "t", path)
    assert num_colours(path) == 2


def test_shares_are_drawn_in_a_colour_per_implementation(tmp_path):
    path = tmp_path / "ops.png"
    plot_shares({"linear": {"a": 0.5, "b": 0.7, "c": 0.9}, "norm": {"a": 0.4}}, "t", path)
    assert num_colours(path) == 3
