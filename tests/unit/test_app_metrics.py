"""Every metric's type, labels and buckets as dashboards know them, and the memory of GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app import metrics as figures
from app.metrics import Metrics, acceleration_label
from models.accelerators import REGISTRY

REQUESTS = "0.05 0.1 0.25 0.5 1.0 2.0 3.0 5.0 8.0 13.0 20.0 30.0 60.0 120.0 +Inf"
HISTOGRAMS = {
    "request_duration_seconds": REQUESTS,
    "queue_duration_seconds": REQUESTS,
    "stage_duration_seconds": f"0.005 0.01 {REQUESTS}",
    "tick_duration_seconds": "0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1.0 2.5 5.0 10.0 +Inf",
    "tick_rows": "1.0 2.0 4.0 8.0 16.0 32.0 64.0 128.0 256.0 +Inf",
    "tick_plans": "1.0 2.0 3.0 4.0 6.0 8.0 12.0 16.0 32.0 +Inf",
}
WANTED = {
    "requests": ("counter", "endpoint model acceleration outcome"),
    "request_duration_seconds": ("histogram", "model acceleration outcome"),
    "queue_duration_seconds": ("histogram", "model"),
    "stage_duration_seconds": ("histogram", "stage"),
    "tick_duration_seconds": ("histogram", "model"),
    "tick_rows": ("histogram", "model"),
    "tick_plans": ("histogram", "model"),
    "denoise_steps": ("counter", "model acceleration kind"),
    "network_evaluations": ("counter", "model kind"),
    "forecast_steps": ("counter", ""),
    "auto_choices": ("counter", "model candidate"),
    "auto_moved": ("counter", ""),
    "gate_decisions": ("counter", "model mode decision"),
    "macs": ("counter", "model kind"),
    "images": ("counter", "model"),
    "requests_running": ("gauge", ""),
    "requests_waiting": ("gauge", ""),
    "queue_capacity": ("gauge", ""),
    "body_bytes": ("gauge", ""),
    "spool_bytes": ("gauge", ""),
    "connections": ("gauge", ""),
    "connections_dropped": ("counter", "cause"),
    "waiting_bytes": ("gauge", ""),
    "requests_rejected": ("counter", "reason"),
    "requests_cancelled": ("counter", "cause"),
    "prompt_cache_bytes": ("gauge", ""),
    "feature_memory_bytes": ("gauge", "model"),
    "heap_bytes": ("gauge", "state"),
    "spans": ("counter", "outcome"),
    "out_of_memory": ("counter", ""),
    "model_weight_bytes": ("gauge", "model part"),
    "adapter_memory_bytes": ("gauge", "model"),
    "model_load_duration_seconds": ("gauge", "model"),
    "ready": ("gauge", ""),
    "jobs": ("gauge", "status"),
    "jobs_recovered": ("counter", ""),
    "webhook_deliveries": ("counter", "outcome"),
    "slipstream_build": ("info", ""),
}


def attributes(metrics: Metrics) -> dict[str, Any]:
    """The metrics by their names without prefix and suffix."""
    found = {name: one for name, one in vars(metrics).items() if name != "registry"}
    return {one._name.removeprefix("slipstream_") if one._type != "info" else one._name: one for one in found.values()}


def samples(metrics: Metrics) -> Iterable[Any]:
    text = generate_latest(metrics.registry).decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def test_every_metric_has_its_type_and_labels_in_order() -> None:
    found = {name: (one._type, " ".join(one._labelnames)) for name, one in attributes(Metrics()).items()}
    assert found == WANTED


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_every_histogram_has_its_buckets(name: str) -> None:
    metrics = Metrics()
    histogram = attributes(metrics)[name]
    (histogram.labels(*histogram._labelnames) if histogram._labelnames else histogram).observe(0.3)
    buckets = [s.labels["le"] for s in samples(metrics) if s.name == f"slipstream_{name}_bucket"]
    assert " ".join(buckets) == HISTOGRAMS[name]


def test_each_server_counts_for_itself() -> None:
    one, other = Metrics(), Metrics()
    one.images.labels("sd").inc(3)
    assert one.registry.get_sample_value("slipstream_images_total", {"model": "sd"}) == 3
    assert other.registry.get_sample_value("slipstream_images_total", {"model": "sd"}) is None


def test_the_process_is_measured_too() -> None:
    names = {sample.name for sample in samples(Metrics())}
    assert {"process_resident_memory_bytes", "python_info", "python_gc_collections_total"} <= names


def test_each_gpu_has_each_kind_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("allocated", "reserved", "peak", "used", "total")
    cards = [
        SimpleNamespace(device=f"cuda:{i}", **{kind: 10 * (i + 1) + k for k, kind in enumerate(kinds)}) for i in (0, 1)
    ]
    monkeypatch.setattr(figures, "device_memory", lambda: cards)
    found = {(s.name, s.labels["device"]): s.value for s in samples(Metrics()) if "gpu" in s.name}
    assert found == {
        (f"slipstream_gpu_memory_{kind}_bytes", f"cuda:{i}"): 10 * (i + 1) + k
        for i in (0, 1)
        for k, kind in enumerate(kinds)
    }


def test_without_a_gpu_there_is_no_series_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "device_memory", list)
    assert "gpu" not in generate_latest(Metrics().registry).decode()


def test_an_acceleration_has_one_label_in_whatever_order_it_is_named() -> None:
    modes = [mode for mode in REGISTRY if mode != "none"]
    bare: dict[str, Any] = {mode: SimpleNamespace(mode=mode) for mode in REGISTRY}
    labels = set()
    for first, second in combinations(modes, 2):
        label = acceleration_label([bare[second], bare["none"], bare[first], bare[second]])
        assert label == f"{first}+{second}"
        labels.add(label)
    assert len(labels) == len(modes) * (len(modes) - 1) / 2
    assert {acceleration_label([bare[mode]]) for mode in REGISTRY} == set(REGISTRY)
