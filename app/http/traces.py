"""OpenTelemetry traces: a span of each counted request and of its stages, made when it has ended of what was noted.

The engine's thread never gets here. Spans wait in a bounded queue for a thread that sends them over OTLP; where the
collector is away, spans are lost and nothing else. The SDK's own variables say the rest: OTEL_SERVICE_NAME,
OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS and their like.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from threading import Thread

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.types import Scope

from app.http.record import Record

QUEUED_SPANS = 2048
"""Spans that may wait to be sent; beyond it the oldest are lost."""
BATCH_SPANS = 512
EXPORT_SECONDS = 2.0
"""What sending a batch may take, tries again included."""
FLUSH_SECONDS = 3.0
"""What sending the last spans may take when the server ends."""
STATE_CHARACTERS = 512
"""Of a client's tracestate; a longer one is left out, as W3C's Trace Context allows."""
PARENT = TraceContextTextMapPropagator()


def exporter(endpoint: str) -> SpanExporter:
    """What sends spans to a collector: OTLP as protobuf over HTTP, to /v1/traces of the address."""
    return OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)


class Counted(SpanExporter):
    """An exporter whose batches are counted."""

    def __init__(self, inner: SpanExporter, spans: Counter) -> None:
        self._inner = inner
        self._spans = spans

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch."""
        result = self._inner.export(spans)
        self._spans.labels("sent" if result is SpanExportResult.SUCCESS else "failed").inc(len(spans))
        return result

    def shutdown(self) -> None:
        """Send nothing more."""
        self._inner.shutdown()


class Traces:
    """Makes the spans of requests. No prompt, key, message or path of a client gets into one."""

    def __init__(self, exporter: SpanExporter, version: str, spans: Counter) -> None:
        named = Resource({"service.name": "slipstream", "service.version": version})
        resource = named.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        sending = BatchSpanProcessor(
            Counted(exporter, spans), max_queue_size=QUEUED_SPANS, max_export_batch_size=BATCH_SPANS
        )
        self._provider.add_span_processor(sending)
        self._tracer = self._provider.get_tracer("slipstream", version)
        self._spans = spans

    def request(self, scope: Scope, record: Record, seconds: float) -> str | None:
        """The spans of a request that ends now, after `seconds`; its trace's id, None where it is not sampled.

        The client's `traceparent` is the parent, and says whether the trace is sampled.
        """
        offset = time.time_ns() - time.monotonic_ns()
        ended = time.monotonic()

        def moment(monotonic: float) -> int:
            return offset + int(monotonic * 1e9)

        span = self._tracer.start_span(
            f"{scope['method']} {record.endpoint}",
            context=_parent(Headers(scope=scope)),
            kind=SpanKind.SERVER,
            start_time=moment(ended - seconds),
            attributes={
                "http.request.method": scope["method"],
                "http.route": record.endpoint,
                "http.response.status_code": record.status,
                "slipstream.request_id": record.request_id,
                "slipstream.model": record.model,
                "slipstream.acceleration": record.acceleration,
                "slipstream.outcome": record.outcome,
            },
        )
        if not span.is_recording():
            return None
        if record.code:
            span.set_attribute("error.type", record.code)
        if record.outcome in ("error", "deadline"):  # what is the client's is no error of the server's span
            span.set_status(StatusCode.ERROR, record.code)
        below = set_span_in_context(span, Context())
        for name, begin, end in record.stages:
            stage = self._tracer.start_span(name, context=below, start_time=moment(begin))
            stage.end(moment(min(end, ended)))
        span.end(moment(ended))
        self._spans.labels("made").inc(1 + len(record.stages))
        return format_trace_id(span.get_span_context().trace_id)

    async def close(self) -> None:
        """Send what waits, but not for long: the collector may be away."""
        closing = Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, FLUSH_SECONDS)


def _parent(headers: Headers) -> Context:
    """What the client said that this is a part of; nothing where it said nothing that is valid."""
    given = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
    if len(given.get("tracestate", "")) > STATE_CHARACTERS:
        del given["tracestate"]
    return PARENT.extract(given, context=Context())
