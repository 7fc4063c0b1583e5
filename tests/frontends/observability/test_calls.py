"""Spans of HTTP calls, joined to those of requests and to the engine's message."""

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sapwood.observe.metrics import Metrics
from sapwood.observe.requests import RequestObserver
from sapwood.observe.tracing import Tracing

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def traced(api_with, exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return api_with(observer=RequestObserver(Metrics("m"), tracing=Tracing(provider)))


def spans(exporter):
    return {span.name: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize("stream", [False, True])
def test_a_callers_trace_reaches_the_engine(traced, exporter, engine, stream):
    body = {"prompt": "Hi", "stream": stream}
    headers = {"traceparent": TRACEPARENT}
    assert traced.post("/v1/completions", body, headers=headers).status_code == 200
    found = spans(exporter)
    call, request = found["POST /v1/completions"], found["request"]
    assert set(found) == {"POST /v1/completions", "request", "tokenize"}
    assert call.attributes["http.response.status_code"] == 200
    assert format(call.parent.span_id, "016x") == TRACEPARENT.split("-")[2]
    assert request.parent.span_id == call.context.span_id
    assert request.attributes["sapwood.outcome"] == "finished"
    sent = engine.submitted[0].trace
    assert sent.traceparent.split("-")[1] == TRACEPARENT.split("-")[1]
    assert sent.traceparent.split("-")[2] == format(request.context.span_id, "016x")
    assert request.start_time <= sent.sent_ns <= request.end_time


def test_every_prompt_of_a_call_has_its_span(traced, exporter, engine):
    traced.post("/v1/completions", {"prompt": ["a", "b"], "n": 2})
    names = [span.name for span in exporter.get_finished_spans()]
    assert names.count("request") == 2
    assert len({message.trace.traceparent for message in engine.submitted}) == 2


def test_a_refusal_is_an_error_span(traced, exporter, engine):
    traced.post("/generate", {"text": "x" * 5000})
    assert spans(exporter)["request"].attributes["sapwood.outcome"] == "refused"
    assert not spans(exporter)["request"].status.is_ok


def test_probes_are_not_traced(traced, exporter):
    traced.get("/health")
    traced.get("/v1/models")
    assert exporter.get_finished_spans() == ()


def test_without_tracing_nothing_is_sent(api, engine):
    api.post("/generate", {"text": "Hi"}, headers={"traceparent": TRACEPARENT})
    assert engine.submitted[0].trace is None
