import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from sapwood.base.errors import ConfigError
from sapwood.bench.distribution import Spread
from sapwood.bench.environment import describe_environment
from sapwood.bench.report import (
    OutputOptions,
    latency_table,
    options_json,
    report_stem,
    serving_remarks,
    spread_text,
    totals_table,
    write_json,
)
from sapwood.bench.serving import ServingOptions
from sapwood.bench.timeline import RequestTimeline, compute_metrics

TIMELINE = RequestTimeline(
    index=0,
    asked_prompt_tokens=10,
    asked_output_tokens=2,
    sent_s=0.0,
    token_s=(0.5, 0.75),
    end_s=1.0,
    num_prompt_tokens=10,
    num_output_tokens=2,
    num_cached_tokens=6,
    counted_by_server=True,
    finish="length",
    error=None,
)


def shown(*renderables):
    console = Console(file=StringIO(), width=120)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue()


def test_tables_show_the_figures():
    metrics = compute_metrics([TIMELINE], exact_prompts=True)
    text = shown(latency_table(metrics, "t"), totals_table(metrics))
    for word in ("TTFT", "500.00", "TPOT", "250.00", "1 of 1", "2.0 tok/s", "10 (6 cached)"):
        assert word in text


def test_missing_latencies_are_dashes():
    metrics = compute_metrics([replace(TIMELINE, error="x")], exact_prompts=True)
    assert "-" in shown(latency_table(metrics, "t"))


def test_failures_come_before_warnings_and_none_is_hidden():
    failed = [replace(TIMELINE, error=f"kind {index % 7}") for index in range(8)]
    metrics = compute_metrics([replace(TIMELINE, num_output_tokens=1), *failed], exact_prompts=True)
    remarks = serving_remarks(metrics)
    assert remarks[0] == "2 requests failed: kind 0"
    assert remarks[5] == "2 further kinds of failure are in the JSON file"
    assert remarks[6].startswith("1 of 1 outputs")


def test_options_keep_secrets_and_infinity_out_of_json():
    options = options_json(ServingOptions(api_key="secret"), OutputOptions())
    assert "api_key" not in options
    assert options["request_rate"] == "inf"
    assert json.loads(json.dumps(options, allow_nan=False)) == options


def test_names_sort_by_time():
    environment = replace(describe_environment(), date="2026-01-02T03:04:05+00:00")
    assert report_stem("serving", ["a", "c"], environment) == "serving-a-c-20260102T030405"


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output-dir"):
        write_json(tmp_path / "file" / "x.json", {})


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1234.5], "1234"),
        ([1234.5, 1000.0, 2000.0], "1234 [1000-2000]"),
        ([123.45], "123.5"),
        ([1.234], "1.23"),
        ([0.01234], "0.012"),
    ],
)
def test_spreads_show_what_is_significant(values, text):
    assert spread_text(Spread.of(values)) == text
