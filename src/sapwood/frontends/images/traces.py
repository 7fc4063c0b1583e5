"""OpenTelemetry spans of pictures, as the API process sees them.

picture            a child of the caller's traceparent
  ├─ waiting       until its first step
  ├─ denoising     until its last step
  └─ decoding      until its pixels are there
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from sapwood.observe.tracing import Tracing
from sapwood.schema.painting import Paint, PaintDone, PaintEvent, PaintFailed, PaintProgress


class PictureTrace:
    """The spans of one picture; `end` is called once, whatever became of it."""

    def __init__(self, tracing: Tracing, headers: Mapping[str, str], paint: Paint) -> None:
        self._tracing = tracing
        self._start_ns = time.time_ns()
        self._last_step_ns: int | None = None
        self._outcome = "abandoned"
        names = [name for name in ("traceparent", "tracestate") if name in headers]
        self._span = tracing.start(
            "picture",
            parent={name: headers[name] for name in names},
            start_ns=self._start_ns,
            attributes={"gen_ai.request.id": paint.request_id, "sapwood.priority": paint.priority},
        )

    def note(self, event: PaintEvent) -> None:
        match event:
            case PaintProgress():
                self._last_step_ns = time.time_ns()
            case PaintDone():
                self._stages(event)
                self._outcome = "done"
                self._span.set_attribute("sapwood.num_steps", event.num_steps)
            case PaintFailed():
                self._outcome = event.kind

    def end(self) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("sapwood.outcome", self._outcome)
        if self._outcome == "failed":
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()

    def _stages(self, done: PaintDone) -> None:
        now_ns = time.time_ns()
        began_ns = min(self._start_ns + int(done.queue_s * 1e9), now_ns)
        denoised_ns = max(began_ns, self._last_step_ns or began_ns)
        ends = {"waiting": began_ns, "denoising": denoised_ns, "decoding": now_ns}
        start_ns = self._start_ns
        for name, end_ns in ends.items():
            self._tracing.start(name, parent=self._span, start_ns=start_ns).end(end_ns)
            start_ns = end_ns
