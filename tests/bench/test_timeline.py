import re
from dataclasses import replace

import pytest

from sapwood.bench.timeline import RequestTimeline, compute_metrics, peak_concurrency

FIRST = RequestTimeline(
    index=0,
    asked_prompt_tokens=10,
    asked_output_tokens=4,
    sent_s=0.0,
    token_s=(0.5, 0.6, 0.8, 1.1),
    end_s=1.2,
    num_prompt_tokens=10,
    num_output_tokens=4,
    num_cached_tokens=8,
    counted_by_server=True,
    finish="length",
    error=None,
)
SECOND = replace(
    FIRST,
    index=1,
    sent_s=1.0,
    token_s=(1.1, 1.9),
    end_s=2.0,
    num_cached_tokens=None,
    # Two events held four tokens: TPOT counts tokens, ITL events.
    num_output_tokens=4,
)
FAILED = replace(FIRST, index=2, sent_s=0.2, token_s=(0.3,), end_s=4.0, error="HTTP 503: full")


def test_the_arithmetic_of_one_request():
    assert FIRST.ttft_s == 0.5
    assert FIRST.tpot_s == pytest.approx(0.6 / 3)
    assert FIRST.itl_s == pytest.approx([0.1, 0.2, 0.3])
    assert FIRST.e2e_s == 1.2
    assert SECOND.tpot_s == pytest.approx(0.8 / 3)
    assert SECOND.itl_s == pytest.approx([0.8])


def test_one_token_has_no_time_per_output_token():
    one = replace(FIRST, token_s=(0.5,), num_output_tokens=1)
    assert one.tpot_s is None
    assert one.itl_s == []
    assert replace(FIRST, token_s=()).ttft_s is None


def test_the_metrics_of_a_run():
    metrics = compute_metrics([FIRST, SECOND], exact_prompts=True)
    assert metrics.duration_s == 2.0
    assert metrics.request_rate == 1.0
    assert metrics.input_tok_s == 10.0
    assert metrics.output_tok_s == 4.0
    assert metrics.total_tok_s == 14.0
    assert metrics.num_cached_tokens == 8
    assert metrics.peak_concurrency == 2
    assert metrics.ttft_ms is not None
    assert metrics.ttft_ms.mean == pytest.approx(300.0)
    assert metrics.itl_ms is not None
    assert metrics.itl_ms.count == 4
    assert metrics.itl_ms.maximum == pytest.approx(800.0)
    assert metrics.e2e_ms is not None
    assert metrics.e2e_ms.median == pytest.approx(1100.0)
    assert metrics.warnings == ()


def test_failures_are_counted_and_leave_the_latencies_alone():
    metrics = compute_metrics(
        [FIRST, FAILED, replace(FAILED, error="other"), FAILED], exact_prompts=True
    )
    assert (metrics.num_requests, metrics.num_completed, metrics.num_failed) == (4, 1, 3)
    assert [(failure.message, failure.count) for failure in metrics.failures] == [
        ("HTTP 503: full", 2),
        ("other", 1),
    ]
    assert metrics.ttft_ms is not None
    assert metrics.ttft_ms.count == 1
    assert metrics.num_output_tokens == 4
    # Throughput pays for the time that failures took.
    assert metrics.output_tok_s == pytest.approx(4 / 4.0)


def test_a_run_of_failures_has_no_latencies():
    metrics = compute_metrics([FAILED], exact_prompts=True)
    assert metrics.ttft_ms is None
    assert metrics.e2e_ms is None
    assert metrics.output_tok_s == 0.0
    with pytest.raises(ValueError, match="at least one request"):
        compute_metrics([], exact_prompts=True)


def test_touching_requests_do_not_overlap():
    after = replace(FIRST, sent_s=1.2, end_s=2.0)
    assert peak_concurrency([FIRST, after]) == 1
    assert peak_concurrency([FIRST, SECOND, FAILED]) == 3


@pytest.mark.parametrize(
    ("changed", "exact", "message"),
    [
        (replace(FIRST, num_output_tokens=3), True, "1 of 1 outputs .* 3 tokens instead of 4"),
        (replace(FIRST, num_prompt_tokens=11), True, "11 tokens instead of 10"),
        (replace(FIRST, num_prompt_tokens=14), False, "counted 14 tokens where 10 were meant"),
        (replace(FIRST, counted_by_server=False), True, "without token counts"),
    ],
)
def test_other_lengths_are_warned_about(changed, exact, message):
    (warning,) = compute_metrics([changed], exact_prompts=exact).warnings
    assert re.search(message, warning)
