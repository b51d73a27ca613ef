"""Rules and dashboard name only metrics and labels that the server has, and every alert is tested and explained."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from app.metrics import Metrics
from tests.deploy import DEPLOY, ROOT, dashboard_queries

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
ALWAYS = {"job", "instance", "le"}
RULES = DEPLOY / "prometheus/rules.yml"
DCGM = [
    f"DCGM_FI_DEV_{what}"
    for what in ("GPU_TEMP", "POWER_USAGE", "GPU_UTIL", "MEM_COPY_UTIL", "XID_ERRORS", "FB_FREE", "FB_USED")
]
"""Gauges among those that NVIDIA's exporter has by default (its etc/default-counters.csv)."""
GAUGES = {f"slipstream_gpu_memory_{kind}_bytes" for kind in ("allocated", "reserved", "peak", "used", "total")} | {
    metric._name
    for metric in vars(Metrics()).values()
    if isinstance(metric, MetricWrapperBase) and metric._type == "gauge"
}


def rules() -> list[dict[str, Any]]:
    """Every rule of every group."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


ALERTS = [rule["alert"] for rule in rules() if "alert" in rule]
RECORDED = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
SCALER = yaml.safe_load((DEPLOY / "kubernetes/autoscaling/scaledobject.yaml").read_text())["spec"]["triggers"]
QUERIES = {
    **{f"dashboard: {title}": expr for title, expr in dashboard_queries().items()},
    **{f"rule: {rule.get('alert') or rule['record']}": rule["expr"] for rule in rules()},
    **{f"scaler: {trigger['name']}": trigger["metadata"]["query"] for trigger in SCALER},
}


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Label names by sample name, of every metric that the server can export."""
    metrics = Metrics()
    out: dict[str, set[str]] = {"process_resident_memory_bytes": set(), "up": set()}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            for suffix in SUFFIXES.get(str(metric._type), ("",)):
                out[metric._name + suffix] = set(metric._labelnames)
    for kind in ("allocated", "reserved", "peak", "used", "total"):
        out[f"slipstream_gpu_memory_{kind}_bytes"] = {"device"}
    for name in DCGM:
        out[name] = {"gpu", "UUID", "Hostname"}
    return out


def names(query: str) -> dict[str, set[str]]:
    """Labels that a query asks of each metric it reads; labels it groups by are asked of all."""
    read = dict.fromkeys(
        re.findall(r"\b(?:slipstream_\w+|process_\w+|DCGM_\w+|up)\b", re.sub(r"\b\w+:\w+:\w+", "", query)), ""
    )
    for metric, matchers in re.findall(r"(\w+)\{([^}]*)\}", query):
        read[metric] = matchers
    grouped = {g for by in re.findall(r"\bby \(([^)]*)\)", query) for g in re.split(r",\s*", by) if g}
    return {metric: set(re.findall(r"(\w+)=~?\"", text)) | grouped for metric, text in read.items()}


@pytest.mark.parametrize("name", QUERIES)
def test_metrics_and_labels_exist(name: str, exported: dict[str, set[str]]) -> None:
    query = QUERIES[name]
    recorded = set(re.findall(r"\b\w+:\w+:\w+", query))
    assert recorded <= set(RECORDED)
    asked = names(query)
    assert asked or recorded
    for metric, labels in asked.items():
        assert metric in exported
        assert labels <= exported[metric] | ALWAYS, metric


def test_the_reading_of_queries() -> None:
    query = 'sum by (model, le) (rate(slipstream_a_bucket{outcome=~"x|y",job="z"}[5m])) / slipstream_b and a:up_c:d'
    assert names(query) == {"slipstream_a_bucket": {"model", "le", "outcome", "job"}, "slipstream_b": {"model", "le"}}


def test_dashboard_is_what_its_source_makes() -> None:
    built = runpy.run_path(str(DEPLOY / "grafana/build.py"))
    assert json.loads(built["TARGET"].read_text()) == built["dashboard"](), "run: python deploy/grafana/build.py"


def test_dashboard_has_no_overlaps_and_no_double_ids() -> None:
    panels = json.loads((DEPLOY / "grafana/dashboards/slipstream.json").read_text())["panels"]
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    assert len({p["id"] for p in panels}) == len(panels)


def targets() -> list[tuple[str, str, str]]:
    """Title, query and legend of everything that is drawn as lines."""
    panels = json.loads((DEPLOY / "grafana/dashboards/slipstream.json").read_text())["panels"]
    lines = [panel for panel in panels if panel["type"] == "timeseries"]
    return [(panel["title"], t["expr"], t["legendFormat"]) for panel in lines for t in panel["targets"]]


def test_a_legend_tells_apart_what_its_query_does() -> None:
    """Every label that lines are grouped by is in their names, and no name asks for a label that is gone."""
    for title, query, legend in targets():
        grouped = {label for by in re.findall(r"\bby \(([^)]*)\)", query) for label in re.split(r",\s*", by) if label}
        asked = set(re.findall(r"{{(\w+)}}", legend))
        assert not grouped or asked == grouped - {"le"}, title


def test_what_each_server_has_is_told_apart_by_server() -> None:
    """Gauges of two servers are two lines; only the store's are the same from each of them."""
    drawn = [(title, names(query).keys() & GAUGES, legend) for title, query, legend in targets()]
    assert sum(bool(gauges) for _, gauges, _ in drawn) > 15
    for title, gauges, legend in drawn:
        assert not gauges - {"slipstream_jobs"} or "{{instance}}" in legend, title


def test_every_topic_has_a_panel() -> None:
    """Forecasts, gates, auto, jobs; and of DCGM utilisation, power, memory, XID."""
    read = {metric for _, query, _ in targets() for metric in names(query)}
    assert {
        "slipstream_network_evaluations_total",
        "slipstream_gate_decisions_total",
        "slipstream_auto_choices_total",
        "slipstream_auto_moved_total",
        "slipstream_jobs",
        "slipstream_jobs_recovered_total",
        *(f"DCGM_FI_DEV_{what}" for what in ("GPU_UTIL", "POWER_USAGE", "FB_USED", "FB_FREE", "XID_ERRORS")),
    } <= read


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_fires_in_a_test_and_is_explained(alert: str) -> None:
    cases = yaml.safe_load((DEPLOY / "prometheus/rules_test.yml").read_text())["tests"]
    fired = [
        a for case in cases for a in case.get("alert_rule_test", ()) if a["alertname"] == alert and a["exp_alerts"]
    ]
    quiet = [
        a for case in cases for a in case.get("alert_rule_test", ()) if a["alertname"] == alert and not a["exp_alerts"]
    ]
    assert fired
    assert quiet
    assert f"### {alert}" in (ROOT / "deploy/docs/operations.md").read_text()


@pytest.mark.prometheus
@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")],
)
def test_promtool(command: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool") or pytest.skip("promtool is not installed")
    done = subprocess.run([promtool, *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kubernetes_alerts_are_the_same() -> None:
    manifest = yaml.safe_load((DEPLOY / "kubernetes/monitoring/prometheusrule.yaml").read_text())
    assert manifest["spec"] == yaml.safe_load(RULES.read_text())
