"""Traces of real requests through the real app, read from the SDK's exporter in memory or by a collector over HTTP."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from app.http import traces
from app.http.record import Record
from app.metrics import Metrics
from models import Backbone
from models.reuse.rows import Row
from tests.serving import PROMPT, aio, events, hooked, serving, until

Model = Callable[..., Backbone]
COLLECTOR = "http://collector.invalid:4318"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
STAGES = ["queue", "encode", "denoise", "decode", "serialize"]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """In place of what sends; holds everything as soon as a server has ended."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(traces, "exporter", lambda endpoint: exporter)
    return exporter


def roots(memory: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """Servers' spans by request id."""
    found = [span for span in memory.get_finished_spans() if span.kind is SpanKind.SERVER]
    return {str((span.attributes or {})["slipstream.request_id"]): span for span in found}


def below(memory: InMemorySpanExporter, root: ReadableSpan) -> list[ReadableSpan]:
    """A span's children in the order in which they began."""
    children = [s for s in memory.get_finished_spans() if s.parent and s.parent.span_id == root.context.span_id]
    assert all(child.context.trace_id == root.context.trace_id for child in children)
    return sorted(children, key=moments)


def moments(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


@aio
async def test_a_request_and_its_stages(student_of: Model, memory: InMemorySpanExporter) -> None:
    given = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine", "tracestate": "vendor=1"}
    before = time.time_ns()
    async with serving({"sd": student_of("sd")}, otlp_endpoint=COLLECTOR) as served:
        answer = await served.post(headers=given, acceleration={"mode": "deepcache"}, num_images=2)
        stream = await served.post(headers={"x-request-id": "stream"}, stream=True)
        unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00", "x-request-id": "unsampled"}
        broken = {"traceparent": f"00-{TRACE}-{PARENT}-zz", "x-request-id": "broken"}
        for headers in (unsampled, broken):
            assert (await served.post(headers=headers)).status_code == 200
        assert (await served.client.get("/v1/models")).status_code == 200
        made = served.value("spans_total", outcome="made")
    after = time.time_ns()
    assert answer.status_code == 200
    found = roots(memory)
    assert set(found) == {"mine", "stream", "broken"}
    assert made == len(memory.get_finished_spans()) == 18 == served.value("spans_total", outcome="sent")

    mine = found["mine"]
    assert mine.name == "POST /generate"
    assert dict(mine.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "slipstream.request_id": "mine",
        "slipstream.model": "sd",
        "slipstream.acceleration": "deepcache",
        "slipstream.outcome": "ok",
    }
    assert f"{mine.context.trace_id:032x}" == TRACE
    assert mine.parent is not None
    assert f"{mine.parent.span_id:016x}" == PARENT
    assert mine.context.trace_state.get("vendor") == "1"
    assert mine.status.status_code is StatusCode.UNSET
    assert f"{found['broken'].context.trace_id:032x}" != TRACE
    assert found["broken"].parent is None

    for root in found.values():
        children = below(memory, root)
        assert [child.name for child in children] == STAGES
        begin, end = moments(root)
        assert before <= begin < end <= after
        inside = [moment for child in children for moment in moments(child)]
        assert inside == sorted(inside)
        assert begin <= inside[0]
        assert inside[-1] <= end
    timing = answer.json()["timing"]
    seconds = {child.name: (moments(child)[1] - moments(child)[0]) / 1e9 for child in below(memory, mine)}
    assert seconds["queue"] == pytest.approx(timing["queue_seconds"], abs=1e-5)
    assert seconds["encode"] + seconds["denoise"] == pytest.approx(timing["denoise_seconds"], abs=1e-5)
    assert seconds["decode"] == pytest.approx(timing["decode_seconds"], abs=1e-5)
    assert events(stream.text)[-1][0] == "completed"


@aio
async def test_one_that_fails_and_one_that_is_left(student_of: Model, memory: InMemorySpanExporter) -> None:
    forwards: list[int] = []
    go = threading.Event()
    break_down = [False]

    def before(rows: Sequence[Row]) -> None:
        forwards.append(len(rows))
        if break_down[0]:
            raise RuntimeError("a kernel's own words")
        go.wait(20)

    go.set()  # while it warms up
    async with serving({"sd": hooked(student_of("sd"), before)}, otlp_endpoint=COLLECTOR) as served:
        await served.post(headers={"x-request-id": "warm"})
        go.clear()
        known = len(forwards)
        left = asyncio.ensure_future(served.post(headers={"x-request-id": "left"}, num_inference_steps=50))
        await until(lambda: len(forwards) > known)
        waits = asyncio.ensure_future(served.post(headers={"x-request-id": "waits"}, prompt="never begun"))
        await until(lambda: served.value("requests_waiting") == 1)
        for task in (left, waits):
            task.cancel()
        await asyncio.gather(left, waits, return_exceptions=True)
        go.set()
        await until(lambda: served.value("requests_running") == 0)
        break_down[0] = True
        failed = await served.post(headers={"x-request-id": "failed"})
        refused = await served.post(headers={"x-request-id": "refused"}, model="secret words of a client")
    assert (failed.status_code, refused.status_code) == (500, 404)
    found = roots(memory)
    facts = {name: dict(span.attributes or {}) for name, span in found.items()}
    children = {name: [child.name for child in below(memory, span)] for name, span in found.items()}
    assert {name: one["slipstream.outcome"] for name, one in facts.items()} == {
        "warm": "ok", "left": "cancelled", "waits": "cancelled", "failed": "error", "refused": "invalid"
    }  # fmt: skip
    assert children["left"] == children["failed"] == ["queue", "encode", "denoise"]
    assert children["waits"] == ["queue"]
    assert not children["refused"]
    assert facts["failed"]["error.type"] == failed.json()["error"]["code"]
    assert facts["left"]["error.type"] == "client_gone"
    erroneous = {name for name, span in found.items() if span.status.status_code is StatusCode.ERROR}
    assert erroneous == {"failed"}
    told = " ".join(span.to_json() for span in memory.get_finished_spans())
    assert not [words for words in (PROMPT, "never begun", "secret words", "own words") if words in told]


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes OTLP over HTTP as a collector does."""

    taken: list[tuple[str, ExportTraceServiceRequest]]

    def do_POST(self) -> None:
        """Keep what came."""
        data = self.rfile.read(int(self.headers["content-length"]))
        data = gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data
        self.taken.append((self.path, ExportTraceServiceRequest.FromString(data)))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, ExportTraceServiceRequest]]]]:
    """Its address, and what it took."""
    taken: list[tuple[str, ExportTraceServiceRequest]] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Taking", (Collector,), {"taken": taken}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", taken
    server.shutdown()
    server.server_close()


def test_a_collector_gets_them_over_http(
    student_of: Model, collector: tuple[str, list[tuple[str, ExportTraceServiceRequest]]]
) -> None:
    address, taken = collector

    async def ask() -> None:
        async with serving({"sd": student_of("sd")}, otlp_endpoint=address) as served:
            assert (await served.post("/generate", headers={"x-request-id": "sent"})).status_code == 200

    asyncio.run(ask())
    [(path, message)] = taken
    assert path == "/v1/traces"
    [resource] = message.resource_spans
    facts = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert facts["service.name"] == "slipstream"
    assert {span.name for scope in resource.scope_spans for span in scope.spans} == {*STAGES, "POST /generate"}


def test_a_collector_that_is_away_costs_spans_alone(student_of: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes connections and says nothing: answers come, and the server's end does not wait for it."""
    monkeypatch.setattr(traces, "EXPORT_SECONDS", 60.0)
    monkeypatch.setattr(traces, "FLUSH_SECONDS", 0.3)

    async def ask(port: int) -> float:
        async with serving({"sd": student_of("sd")}, otlp_endpoint=f"http://127.0.0.1:{port}") as served:
            assert (await served.post()).status_code == 200
            assert served.value("spans_total", outcome="made") == 6
            began = time.monotonic()
        assert served.value("spans_total", outcome="sent") == 0
        return time.monotonic() - began

    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert 0.3 <= asyncio.run(ask(silent.getsockname()[1])) < 10


class Held(InMemorySpanExporter):
    """Sends nothing until it may."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Wait, then keep them."""
        self.go.wait(20)
        return super().export(spans)


@aio
async def test_what_waits_to_be_sent_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "QUEUED_SPANS", 16)
    monkeypatch.setattr(traces, "BATCH_SPANS", 4)
    exporter, spans = Held(), Metrics().spans
    sending = traces.Traces(exporter, "0", spans)
    scope = {"type": "http", "method": "POST", "headers": []}
    for number in range(100):
        sending.request(scope, Record(f"{number}", endpoint="/generate"), 0.0)
    exporter.go.set()
    await sending.close()
    sent = [str((span.attributes or {})["slipstream.request_id"]) for span in exporter.get_finished_spans()]
    assert 16 <= len(sent) <= 20  # those that waited, and a batch on its way
    assert sent[-16:] == [f"{number}" for number in range(84, 100)]
    assert spans.labels("made")._value.get() == 100
    assert spans.labels("sent")._value.get() == len(sent)


OFF = """
import sys
from app.http.main import create_app
from app.settings import Settings
create_app(Settings(), {})
ours = [name for name in sys.modules if name.startswith(("opentelemetry.", "app.http.traces"))]
print([name for name in ours if name.split(".")[1] in ("sdk", "exporter", "proto", "http")])
"""


def test_neither_sdk_nor_exporter_is_imported_when_it_is_off() -> None:
    """FastAPI itself takes the bare API where it finds it, which sends nothing."""
    ran = subprocess.run([sys.executable, "-c", OFF], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
