import threading

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sapwood.observe.metrics import Metrics
from sapwood.observe.requests import RequestObserver


def read(text: str) -> dict[str, float]:
    """Sums over all labels."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0) + sample.value
    return totals


@pytest.fixture
def observer():
    return RequestObserver(Metrics("org/tiny", custom_labels=("tenant",)))


@pytest.fixture
def metered(api_with, observer):
    return api_with(observer=observer, serves_metrics=True)


def test_without_the_option_there_are_none(api):
    response = api.get("/metrics")
    assert response.status_code == 404
    assert "--enable-metrics" in response.json()["error"]["message"]


def test_the_text_format_whatever_is_accepted(metered):
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    response = metered.get("/metrics", headers={"accept": accept})
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "sapwood:num_requests_total" in response.text


def test_every_dialect_is_counted(metered, engine):
    engine.num_cached_tokens = 2
    chat = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/completions", {"prompt": ["Hi", "Ho"]}),
        ("/generate", {"text": "Hi", "sampling_params": {"n": 2}}),
        ("/v1/messages", {**chat, "max_tokens": 5}),
        ("/api/chat", {**chat, "model": "org/tiny", "stream": False}),
    ):
        assert metered.post(path, body).status_code == 200, path
    found = read(metered.get("/metrics").text)
    assert found["sapwood:num_requests_total"] == 6
    assert found["sapwood:num_finished_requests_total"] == 6
    assert found["sapwood:cached_tokens_total"] == 12
    assert found["sapwood:time_to_first_token_seconds_count"] == 7
    assert found["sapwood:e2e_request_latency_seconds_count"] == 7


def test_refusals_are_counted(metered, engine):
    assert metered.post("/generate", {"text": "x" * 5000}).status_code == 400
    engine.fail_after = 0
    assert metered.post("/generate", {"text": "x"}).status_code == 503
    engine.unavailable_reason = "starting"
    assert metered.post("/generate", {"text": "x"}).status_code == 503
    found = read(metered.get("/metrics").text)
    assert found["sapwood:num_requests_total"] == 3
    assert found["sapwood:num_refused_requests_total"] == 3
    assert found["sapwood:num_open_requests"] == 0


def test_calls_are_counted_by_route(metered):
    metered.get("/health")
    metered.get("/v1/models/org/tiny")
    metered.get("/no/such/path/1")
    metered.get("/no/such/path/2")
    metered.post("/generate", {"text": 7})
    text = metered.get("/metrics").text
    for line in (
        'http_requests_total{endpoint="/health",method="GET"} 1.0',
        'http_requests_total{endpoint="/v1/models/{model:path}",method="GET"} 1.0',
        'http_requests_total{endpoint="unmatched",method="GET"} 2.0',
        'http_responses_total{endpoint="unmatched",method="GET",status_code="404"} 2.0',
        'http_responses_total{endpoint="/generate",method="POST",status_code="400"} 1.0',
    ):
        assert f"sapwood:{line}\n" in text
    assert "sapwood:http_requests_active 1.0\n" in text


@pytest.mark.parametrize(
    ("header", "tenant"),
    [
        ('{"tenant": "acme", "other": "x"}', "acme"),
        ('{"tenant": 3}', ""),
        ("not json", ""),
        ("[1]", ""),
        (None, ""),
    ],
)
def test_labels_come_from_the_header_if_they_are_allowed(metered, header, tenant):
    headers = {} if header is None else {"x-custom-labels": header}
    metered.post("/generate", {"text": "Hi"}, headers=headers)
    text = metered.get("/metrics").text
    line = f'sapwood:num_requests_total{{model_name="org/tiny",tenant="{tenant}"}} 1.0\n'
    assert line in text
    assert "other" not in text.replace("nothing", "")


def test_a_client_that_leaves_is_an_abort(live, services, engine, until):
    engine.reply = "y" * 500
    engine.step_s = 0.01
    totals = services.observer.metrics.totals

    def read_a_little() -> None:
        body = {"prompt": "Hi", "stream": True, "max_tokens": 400}
        with httpx.stream("POST", f"{live.url}/v1/completions", json=body) as response:
            next(response.iter_lines())

    reader = threading.Thread(target=read_a_little)
    reader.start()
    reader.join()
    until(lambda: totals().num_aborted == 1)
    assert (totals().num_requests, totals().num_open) == (1, 0)


def test_an_engine_that_does_not_answer_leaves_the_rest(metered, engine, monkeypatch):
    async def fail():
        raise AssertionError("not asked")

    metered.get("/metrics")
    engine.unavailable_reason = "starting"
    found = read(metered.get("/metrics").text)
    assert found["sapwood:num_requests_total"] == 0
