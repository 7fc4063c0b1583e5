import sys
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sapwood.base.errors import ConfigError
from sapwood.observe.tracing import EngineSpans, RequestTrace, Tracing, open_tracing

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = TRACEPARENT[:-1] + "0"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider)


def by_name(exporter):
    return {span.name: span for span in exporter.get_finished_spans()}


def output(*token_ids, finish=None, queue_time_s=0.001):
    return SimpleNamespace(
        request_id="r",
        token_ids=list(token_ids),
        num_prompt_tokens=5,
        num_cached_tokens=2,
        queue_time_s=queue_time_s,
        finish=None if finish is None else SimpleNamespace(kind=finish),
    )


def test_a_request_goes_from_the_caller_down_to_the_engines_stages(tracing, exporter):
    call = tracing.start("POST /generate", parent={"traceparent": TRACEPARENT}, is_server=True)
    trace = RequestTrace(tracing, call, "r", 1)
    trace.tokenized(5)
    engine = EngineSpans(tracing)
    engine.accepted("r", trace.parent, 0)
    for step in (output(7), output(8), output(9, finish="stop")):
        engine.outputs([step])
    trace.end("finished", {"gen_ai.usage.completion_tokens": 3}, error=None)
    call.end()
    spans = by_name(exporter)
    assert set(spans) == {
        "POST /generate",
        "request",
        "tokenize",
        "dispatch",
        "prefill_waiting",
        "prefill_forward",
        "decode_loop",
    }
    assert {format(span.context.trace_id, "032x") for span in spans.values()} == {
        TRACEPARENT.split("-")[1]
    }
    assert format(spans["POST /generate"].parent.span_id, "016x") == TRACEPARENT.split("-")[2]
    assert spans["request"].parent.span_id == spans["POST /generate"].context.span_id
    for name in ("tokenize", "dispatch", "prefill_waiting", "prefill_forward", "decode_loop"):
        assert spans[name].parent.span_id == spans["request"].context.span_id
    assert spans["decode_loop"].attributes["gen_ai.usage.completion_tokens"] == 3
    assert spans["prefill_forward"].attributes["sapwood.cached_tokens"] == 2
    order = ("prefill_waiting", "prefill_forward", "decode_loop")
    times = [time for name in order for time in (spans[name].start_time, spans[name].end_time)]
    assert times == sorted(times)


def test_a_caller_that_does_not_sample_is_not_traced(tracing, exporter):
    call = tracing.start("POST /generate", parent={"traceparent": NOT_SAMPLED})
    trace = RequestTrace(tracing, call, "r", 1)
    assert trace.parent == ""
    trace.tokenized(5)
    trace.end("finished", {}, error=None)
    call.end()
    assert exporter.get_finished_spans() == ()


def test_without_a_caller_a_trace_begins_here(tracing, exporter):
    tracing.start("POST /generate", parent={}).end()
    assert by_name(exporter)["POST /generate"].parent is None


def test_a_broken_traceparent_is_ignored(tracing, exporter):
    tracing.start("a", parent={"traceparent": "00-nonsense"}).end()
    assert by_name(exporter)["a"].parent is None


def test_a_request_that_never_ran_has_only_waited(tracing, exporter):
    engine = EngineSpans(tracing)
    engine.accepted("r", TRACEPARENT, 0)
    engine.outputs([output(finish="abort", queue_time_s=0.0)])
    assert set(by_name(exporter)) == {"dispatch", "prefill_waiting"}


def test_an_error_is_the_spans_status(tracing, exporter):
    trace = RequestTrace(tracing, None, "r", 1)
    trace.end("refused", {}, error="too long")
    span = by_name(exporter)["request"]
    assert span.status.description == "too long"
    assert span.attributes["sapwood.outcome"] == "refused"


def test_other_requests_cost_nothing_and_ended_ones_are_forgotten(tracing):
    engine = EngineSpans(tracing)
    engine.outputs([output(1)])
    engine.accepted("r", TRACEPARENT, 0)
    engine.outputs([output(1, finish="length")])
    assert engine._open == {}


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match="opentelemetry-exporter-otlp-proto-grpc"):
        open_tracing("localhost:4317", service="s", version="1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match="--enable-trace needs the package opentelemetry-sdk"):
        open_tracing("http://localhost:1/v1/traces", service="s", version="1")
