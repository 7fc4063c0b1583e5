"""The gateway's spans, joined with its caller's and with those of workers."""

from __future__ import annotations

import asyncio
import logging

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sapwood.app.gateway.assembly import tracing_of
from sapwood.observe.tracing import Tracing
from sapwood.schema.config.gateway import GatewayConfig
from tests.gateway.stubs import Stub, bench

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = f"00-{TRACE}-b7ad6b7169203331-01"


def tracing() -> tuple[Tracing, InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider), exporter


def context(span: ReadableSpan) -> str:
    """The span as a traceparent."""
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"


def test_each_attempt_is_the_parent_of_its_workers_spans() -> None:
    async def run() -> None:
        traced, exporter = tracing()
        bad, good = Stub("bad"), Stub("good")
        bad.behaviour = 503
        async with bench(bad, good, tracing=traced) as made:
            headers = {"traceparent": CALLER, "tracestate": "a=b", "x-request-id": "mine"}
            while not bad.posts:
                exporter.clear()
                assert (await made.post(headers=headers)).status_code == 200
            first, second, gateway = exporter.get_finished_spans()
            assert [first.name, second.name, gateway.name] == ["attempt", "attempt", "gateway"]
            assert gateway.parent is not None
            assert f"{gateway.parent.trace_id:032x}" == TRACE
            assert f"{gateway.parent.span_id:016x}" == "b7ad6b7169203331"
            assert {span.parent and span.parent.span_id for span in (first, second)} == {
                gateway.context.span_id
            }
            assert bad.posts[-1].headers["traceparent"] == context(first)
            assert good.posts[-1].headers["traceparent"] == context(second)
            statuses = [
                dict(span.attributes or {})["http.response.status_code"]
                for span in (first, second, gateway)
            ]
            assert statuses == [503, 200, 200]
            assert dict(gateway.attributes or {})["sapwood.request_id"] == "mine"

    asyncio.run(run())


def test_a_failure_is_told_by_its_kind() -> None:
    async def run() -> None:
        traced, exporter = tracing()
        stub = Stub("a")
        async with bench(stub, tracing=traced, disable_retries=True) as made:
            with await made.engines[0].kill():
                assert (await made.post()).status_code == 502
            attempt, gateway = exporter.get_finished_spans()
            assert attempt.status.description == "Failed"
            assert gateway.status.description == "BadGateway"

    asyncio.run(run())


def test_without_tracing_a_traceparent_passes_as_it_is() -> None:
    async def run() -> None:
        async with bench(stub := Stub("a")) as made:
            await made.post(headers={"traceparent": CALLER})
            assert stub.posts[0].headers["traceparent"] == CALLER

    asyncio.run(run())


def test_tracing_is_an_option(caplog: pytest.LogCaptureFixture) -> None:
    assert tracing_of(GatewayConfig()) is None
    made = tracing_of(
        GatewayConfig(enable_trace=True, otlp_traces_endpoint="http://127.0.0.1:1/v1/traces")
    )
    assert made is not None
    with caplog.at_level(logging.CRITICAL):
        made.close()
