"""The spans of a picture: a child of the caller's, with its stages one after the other."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sapwood.frontends.images.traces import PictureTrace
from sapwood.observe.tracing import Tracing
from sapwood.schema.painting import (
    Paint,
    PaintDone,
    PaintEvent,
    PaintFailed,
    PaintProgress,
    Picture,
)

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STEP = PaintProgress(request_id="p", step=1, num_steps=1)
DONE = PaintDone(
    request_id="p",
    picture=Picture(width=1, height=1, channels=3, pixels=b"abc"),
    num_steps=1,
    queue_s=0.0,
    paint_s=0.0,
)
FAILED = PaintFailed(request_id="p", kind="failed", message="no", status=500, error_type="x")


def spans_of(*events: PaintEvent):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    paint = Paint(request_id="p", prompt="a secret", seed=1)
    trace = PictureTrace(Tracing(provider), {"traceparent": CALLER}, paint)
    for event in events:
        trace.note(event)
    trace.end()
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_picture_has_its_stages_one_after_the_other():
    spans = spans_of(STEP, DONE)
    assert set(spans) == {"picture", "waiting", "denoising", "decoding"}
    picture = spans["picture"]
    assert format(picture.parent.span_id, "x") == CALLER.split("-")[2]
    assert picture.attributes["sapwood.outcome"] == "done"
    assert picture.attributes["sapwood.num_steps"] == 1
    assert "a secret" not in str(dict(picture.attributes)), "prompts are nobody else's"
    assert picture.start_time == spans["waiting"].start_time
    assert spans["waiting"].end_time == spans["denoising"].start_time
    assert spans["denoising"].end_time == spans["decoding"].start_time
    assert spans["decoding"].end_time <= picture.end_time


@pytest.mark.parametrize(("events", "outcome"), [((FAILED,), "failed"), ((STEP,), "abandoned")])
def test_a_picture_that_is_not_drawn_says_so(events: tuple[PaintEvent, ...], outcome: str):
    spans = spans_of(*events)
    assert set(spans) == {"picture"}
    assert spans["picture"].attributes["sapwood.outcome"] == outcome
    assert spans["picture"].status.is_ok == (outcome != "failed")
