"""OpenTelemetry traces of requests, from the HTTP call down to the engine's stages.

    POST /v1/chat/completions          the API process; a child of the caller's traceparent
      └─ request                       one prompt: its numbers of tokens, how it ended
           ├─ tokenize
           ├─ dispatch                 the engine process: until its loop has read the message
           ├─ prefill_waiting          in the queue
           ├─ prefill_forward          until the first output token
           └─ decode_loop              until the last one

The two processes export on their own; W3C trace context, in the request's message, joins them. The
SDK is imported only by a process that traces, and nothing here is called per token.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from sapwood.base.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

TRACEPARENT = "traceparent"

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]


class Tracing:
    """The spans of one process. `close` sends the last spans, for a few seconds at most."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("sapwood")
        self._propagator = TraceContextTextMapPropagator()

    def start(
        self,
        name: str,
        *,
        parent: Span | str | Mapping[str, str] | None = None,
        start_ns: int | None = None,
        is_server: bool = False,
        attributes: Attributes | None = None,
    ) -> Span:
        """A span that its caller ends.

        parent    a span, a traceparent, or a call's headers with "traceparent" and "tracestate"
        start_ns  Unix time; None: now
        """
        from opentelemetry.trace import SpanKind

        return self._tracer.start_span(
            name,
            context=self._context(parent),
            kind=SpanKind.SERVER if is_server else SpanKind.INTERNAL,
            start_time=start_ns,
            attributes=attributes,
        )

    def traceparent(self, span: Span) -> str:
        """The span as a header's value; "" if it is not recorded."""
        from opentelemetry.trace import set_span_in_context

        if not span.is_recording():
            return ""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier.get(TRACEPARENT, "")

    def close(self) -> None:
        self._provider.shutdown()

    def _context(self, parent: Span | str | Mapping[str, str] | None) -> Context:
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        if parent is None:
            return Context()
        if isinstance(parent, str):
            parent = {TRACEPARENT: parent}
        if isinstance(parent, Mapping):
            return self._propagator.extract(parent, Context())
        return set_span_in_context(parent, Context())


def open_tracing(endpoint: str, *, service: str, version: str) -> Tracing:
    """Tracing that sends spans to the endpoint in the background.

    Raises ConfigError if the endpoint cannot be used.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            "--enable-trace needs the package opentelemetry-sdk; install it, or leave the option "
            "out"
        ) from error
    provider = TracerProvider(
        resource=Resource.create({"service.name": service, "service.version": version})
    )
    provider.add_span_processor(BatchSpanProcessor(_exporter(endpoint)))
    return Tracing(provider)


def _exporter(endpoint: str) -> SpanExporter:
    is_http = endpoint.startswith(("http://", "https://"))
    package = f"opentelemetry-exporter-otlp-proto-{'http' if is_http else 'grpc'}"
    try:
        if is_http:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
                OTLPSpanExporter as HttpExporter,
            )

            return HttpExporter(endpoint=endpoint)

        # This exporter is not among the dependencies, since it brings gRPC along.
        grpc = import_module("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
    except ImportError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint {endpoint} needs the package {package}; install it, or give "
            "the URL of an OTLP endpoint over HTTP, such as http://localhost:4318/v1/traces"
        ) from error
    exporter: SpanExporter = grpc.OTLPSpanExporter(
        endpoint=endpoint.removeprefix("grpc://"), insecure=True
    )
    return exporter


class RequestTrace:
    """The spans of one prompt in the API process."""

    def __init__(
        self, tracing: Tracing, parent: Span | None, request_id: str, num_samples: int
    ) -> None:
        self._tracing = tracing
        self._start_ns = time.time_ns()
        attributes: Attributes = {"gen_ai.request.id": request_id, "sapwood.samples": num_samples}
        self._span = tracing.start(
            "request", parent=parent, start_ns=self._start_ns, attributes=attributes
        )
        self.parent = tracing.traceparent(self._span)

    def prepared(self, num_media: int, start_ns: int) -> None:
        """Pictures and videos were fetched and prepared since `start_ns`."""
        span = self._tracing.start(
            "prepare_media",
            parent=self._span,
            start_ns=start_ns,
            attributes={"sapwood.num_media": num_media},
        )
        span.end()

    def tokenized(self, num_prompt_tokens: int) -> None:
        span = self._tracing.start(
            "tokenize",
            parent=self._span,
            start_ns=self._start_ns,
            attributes={"gen_ai.usage.prompt_tokens": num_prompt_tokens},
        )
        span.end()

    def end(self, outcome: str, attributes: Attributes, *, error: str | None) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("sapwood.outcome", outcome)
        self._span.set_attributes(attributes)
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


class FinishFacts(Protocol):
    @property
    def kind(self) -> str: ...


class OutputFacts(Protocol):
    """The fields of an engine's output that are traced; see `schema.output.RequestOutput`."""

    @property
    def request_id(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def queue_time_s(self) -> float: ...
    @property
    def finish(self) -> FinishFacts | None: ...


class EngineSpans:
    """The stages of traced requests in the engine process, told by its loop."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._open: dict[str, _Stages] = {}

    def accepted(self, request_id: str, traceparent: str, sent_ns: int) -> None:
        self._open[request_id] = _Stages(self._tracing, request_id, traceparent, sent_ns)

    def outputs(self, outputs: Sequence[OutputFacts]) -> None:
        """Note the outputs that are about to be sent. An untraced request costs one dict lookup."""
        if not self._open:
            return
        for output in outputs:
            stages = self._open.get(output.request_id)
            if stages is not None:
                stages.advance(output)
                if output.finish is not None:
                    del self._open[output.request_id]

    def close(self) -> None:
        self._tracing.close()


class _Stages:
    """dispatch, prefill_waiting, prefill_forward and decode_loop, one after the other."""

    def __init__(self, tracing: Tracing, request_id: str, traceparent: str, sent_ns: int) -> None:
        self._tracing = tracing
        self._parent = traceparent
        self._request_id = request_id
        self._accepted_ns = time.time_ns()
        self._first_token_ns: int | None = None
        self._num_output_tokens = 0
        self._add("dispatch", min(sent_ns, self._accepted_ns), self._accepted_ns)

    def advance(self, output: OutputFacts) -> None:
        self._num_output_tokens += len(output.token_ids)
        if self._first_token_ns is None:
            self._end_prefill(output)
        if output.finish is not None and self._first_token_ns is not None:
            attributes: Attributes = {
                "gen_ai.usage.completion_tokens": self._num_output_tokens,
                "gen_ai.response.finish_reason": output.finish.kind,
            }
            self._add("decode_loop", self._first_token_ns, time.time_ns(), attributes)

    def _end_prefill(self, output: OutputFacts) -> None:
        now_ns = time.time_ns()
        finish = output.finish
        never_ran = finish is not None and not output.token_ids and output.queue_time_s == 0
        queue_ns = int(output.queue_time_s * 1e9)
        began_ns = now_ns if never_ran else min(self._accepted_ns + queue_ns, now_ns)
        self._add("prefill_waiting", self._accepted_ns, began_ns)
        if never_ran:
            return
        attributes = {
            "gen_ai.usage.prompt_tokens": output.num_prompt_tokens,
            "sapwood.cached_tokens": output.num_cached_tokens,
        }
        self._add("prefill_forward", began_ns, now_ns, attributes)
        if output.token_ids:
            self._first_token_ns = now_ns

    def _add(
        self, name: str, start_ns: int, end_ns: int, attributes: Attributes | None = None
    ) -> None:
        about = {"gen_ai.request.id": self._request_id, **(attributes or {})}
        span = self._tracing.start(name, parent=self._parent, start_ns=start_ns, attributes=about)
        span.end(end_ns)
