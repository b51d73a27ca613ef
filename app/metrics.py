"""Every metric, once: name, labels, buckets. Labels are bounded: models, routes, modes, outcomes; no client's words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from app.logs import lost_lines
from models.accelerators import REGISTRY, Accelerator
from models.device import device_memory, heap_bytes

REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 13, 20, 30, 60, 120)
TICK_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PLAN_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
DEVICE_MEMORY = {
    "allocated": "Bytes of this process's tensors.",
    "reserved": "Bytes this process holds.",
    "peak": "Most bytes of tensors so far.",
    "used": "Bytes in use on the card, by anyone.",
    "total": "Bytes of the card.",
}
UNKNOWN = "unknown"
"""The label of a request refused before its model or accelerators were known."""


def acceleration_label(accelerators: Iterable[Accelerator]) -> str:
    """The mode names joined by +, each once and in the registry's order, so that there are no more than subsets."""
    modes = {a.mode for a in accelerators} - {"none"}
    return "+".join(mode for mode in REGISTRY if mode in modes) or "none"


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry(auto_describe=True)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"slipstream_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"slipstream_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"slipstream_{name}", text, labels, buckets=buckets, registry=registry)

        facts = ("model", "acceleration", "outcome")
        self.requests = counter("requests_total", "Requests answered or left by their client.", "endpoint", *facts)
        self.request_seconds = histogram(
            "request_duration_seconds", "From the first byte of a request to the last of its answer.", *facts,
            buckets=REQUEST_BUCKETS,
        )  # fmt: skip
        self.queue_seconds = histogram(
            "queue_duration_seconds", "From acceptance to the first tick.", "model", buckets=REQUEST_BUCKETS
        )
        self.stage_seconds = histogram(
            "stage_duration_seconds",
            "Time a request spent in a stage.",
            "stage",
            buckets=(0.005, 0.01, *REQUEST_BUCKETS),
        )
        self.tick_seconds = histogram("tick_duration_seconds", "One tick.", "model", buckets=TICK_BUCKETS)
        self.tick_rows = histogram("tick_rows", "Rows in a tick.", "model", buckets=ROW_BUCKETS)
        self.tick_plans = histogram("tick_plans", "Different plans in a tick.", "model", buckets=PLAN_BUCKETS)
        self.steps = counter(
            "denoise_steps_total", "Steps of images, in full or reduced.", "model", "acceleration", "kind"
        )
        self.evaluations = counter(
            "network_evaluations_total", "Predictions of images' steps, computed or foretold.", "model", "kind"
        )
        self.forecasts = counter("forecast_steps_total", "Steps of images whose whole prediction was foretold.")
        self.choices = counter(
            "auto_choices_total", "Runs that auto chose, by the candidate of a profile.", "model", "candidate"
        )
        self.moved = counter("auto_moved_total", "Flexible requests that were made cheaper for their deadline.")
        self.gates = counter(
            "gate_decisions_total",
            "Steps of images in which a cache decided while it ran whether to skip.",
            "model",
            "mode",
            "decision",
        )
        self.macs = counter(
            "macs_total", "Multiply-accumulates of finished requests, computed or saved.", "model", "kind"
        )
        self.images = counter("images_total", "Images delivered.", "model")
        self.running = gauge("requests_running", "Requests being denoised or decoded.")
        self.waiting = gauge("requests_waiting", "Requests accepted and not started.")
        self.waiting_bytes = gauge("waiting_bytes", "What unanswered requests keep: uploads, pictures, runs.")
        self.capacity = gauge("queue_capacity", "Requests that may wait.")
        self.body_bytes = gauge("body_bytes", "Bodies of requests that are held.")
        self.spool_bytes = gauge("spool_bytes", "Files of lines that are being sent, on their way to the store.")
        self.connections = gauge("connections", "Connections that are open.")
        self.dropped = counter(
            "connections_dropped_total", "Connections closed on a client that did not keep to the rules.", "cause"
        )
        self.rejected = counter("requests_rejected_total", "Requests refused for lack of room or readiness.", "reason")
        self.cancelled = counter("requests_cancelled_total", "Requests given up before their end.", "cause")
        self.prompt_bytes = gauge("prompt_cache_bytes", "Encoded prompts that are kept for the next time.")
        self.feature_bytes = gauge("feature_memory_bytes", "Features remembered between steps.", "model")
        self.out_of_memory = counter("out_of_memory_total", "Times the device had no memory left.")
        self.weight_bytes = gauge(
            "model_weight_bytes",
            "Weights on the device, by part: base, text_encoder, adapter, control.",
            "model",
            "part",
        )
        self.adapter_bytes = gauge("adapter_memory_bytes", "LoRAs on the device, with those that only run.", "model")
        self.load_seconds = gauge("model_load_duration_seconds", "Time to load a model.", "model")
        self.ready = gauge("ready", "1 where new work is taken.")
        self.jobs = gauge("jobs", "Jobs in the store.", "status")
        self.recovered = counter("jobs_recovered_total", "Jobs taken up again that a server had left unfinished.")
        self.webhooks = counter(
            "webhook_deliveries_total", "Tries to deliver a webhook, by what came of them.", "outcome"
        )
        self.heap = gauge("heap_bytes", "The C library's heap: used by the program, or kept for its next use.", "state")
        for state in heap_bytes():
            self.heap.labels(state).set_function(partial(_heap, state))
        self.spans = counter("spans_total", "Spans of traces: made, sent to the collector, refused by it.", "outcome")
        self.build = Info("slipstream_build", "What is running.", registry=registry)
        registry.register(_LogCollector())
        registry.register(_DeviceCollector())
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)


def _heap(state: str) -> float:
    return heap_bytes()[state]


class _LogCollector:
    """Log lines that were lost, read when it is asked for."""

    def collect(self) -> Iterator[Metric]:
        text = "Log lines that nobody took in time."
        return iter([CounterMetricFamily("slipstream_log_lines_lost", text, value=lost_lines())])

    def describe(self) -> Iterator[Metric]:
        return self.collect()


class _DeviceCollector:
    """GPU memory, read when it is asked for; no series where there is no GPU."""

    def collect(self) -> Iterator[Metric]:
        families = {
            kind: GaugeMetricFamily(f"slipstream_gpu_memory_{kind}_bytes", text, labels=["device"])
            for kind, text in DEVICE_MEMORY.items()
        }
        for memory in device_memory():
            for kind, family in families.items():
                family.add_metric([memory.device], getattr(memory, kind))
        return iter([family for family in families.values() if family.samples])

    def describe(self) -> Iterator[Metric]:
        return iter(())
