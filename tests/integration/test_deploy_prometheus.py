"""The real Prometheus, with the configuration that is deployed, scrapes a live server under a mixed load."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from tests.deploy import DEPLOY, dashboard_queries, free_port, get, post, process, until

pytestmark = [pytest.mark.prometheus, pytest.mark.slow]

PROMETHEUS = shutil.which("prometheus")
CONFIG = DEPLOY / "prometheus/prometheus.yml"
RULES = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())
RECORDED = [rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule]
MODES: list[Any] = [
    None,
    {"mode": "deepcache", "interval": 2},
    [{"mode": "deepcache", "interval": 3}, {"mode": "selective_guidance", "stop": 0.5}],
    {"mode": "adaptive_deepcache", "threshold": 100},
    {"mode": "forecast", "interval": 2},
]


def leave(base: str) -> None:
    """Ask for many steps, read the first event, and go."""
    body = {"prompt": "x", "num_inference_steps": 200, "stream": True}
    with httpx.stream("POST", f"{base}/generate", json=body, timeout=30) as response:
        next(response.iter_lines())


def load(base: str) -> set[int]:
    """Requests of several kinds at once, more than the queue holds."""
    with ThreadPoolExecutor(24) as pool:
        leave(base)
        calls = [
            pool.submit(post, base, prompt="x", num_inference_steps=6, acceleration=MODES[i % len(MODES)])
            for i in range(24)
        ]
        calls += [pool.submit(post, base, prompt="x", num_inference_steps=0)]
        return {call.result().status_code for call in calls}


@pytest.fixture(scope="module")
def card() -> Iterator[str]:
    """A stand-in for the series that only a server with a GPU has, or with a profile, or DCGM's exporter."""
    registry = CollectorRegistry()
    Counter("slipstream_auto_choices", "c", ["model", "candidate"], registry=registry).labels("sd", "unipc-8").inc()
    for kind, size in (("allocated", 8), ("reserved", 10), ("peak", 9), ("used", 12), ("total", 80)):
        gauge = Gauge(f"slipstream_gpu_memory_{kind}_bytes", kind, ["device"], registry=registry)
        gauge.labels("0").set(size * 2**30)
    for what, value in (("GPU_UTIL", 97), ("POWER_USAGE", 640), ("GPU_TEMP", 61), ("FB_USED", 9e3), ("FB_FREE", 7e4)):
        Gauge(f"DCGM_FI_DEV_{what}", what, ["gpu", "Hostname"], registry=registry).labels("0", "node").set(value)
    Gauge("DCGM_FI_DEV_XID_ERRORS", "x", ["gpu", "Hostname"], registry=registry).labels("0", "node").set(0)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def base(pipeline_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A live server on the smallest pipeline, with a short queue."""
    port = free_port()
    settings = {
        "MODEL": str(pipeline_dir("sd")),
        "PORT": str(port),
        "MAX_ROWS": "8",
        "MAX_QUEUE": "12",
        "DEVICE": "cpu",
        "DATA_DIR": str(tmp_path_factory.mktemp("store")),
        "WEBHOOK_ORIGINS": "https://hooks.example.com",
        "WEBHOOK_SECRET": "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=",
    }
    command = [sys.executable, "-c", "from app.cli import main; main()", "serve"]
    environment = {f"SLIPSTREAM_{name}": value for name, value in settings.items()}
    with process(command, tmp_path_factory.mktemp("server") / "log", **environment):
        url = f"http://127.0.0.1:{port}"
        until(lambda: get(f"{url}/health/ready"), 150, "the server")
        yield url


@pytest.fixture(scope="module")
def query(base: str, card: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Any]]:
    """Ask the API of a Prometheus that runs the deployed configuration, only faster and on these targets."""
    if PROMETHEUS is None:
        pytest.skip("prometheus is not installed")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(CONFIG.parent / name) for name in config["rule_files"]]
    (job,) = [job for job in config["scrape_configs"] if job["job_name"] == "slipstream"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [base.removeprefix("http://")]}]
    gpu = {"job_name": "card", "static_configs": [{"targets": [card]}]}
    config["scrape_configs"] = [job, gpu]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        PROMETHEUS,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={address}",
    ]

    def ask(what: str, expr: str = "") -> Any:
        answer = json.loads(get(f"http://{address}/api/v1/{what}", query=expr))
        assert answer["status"] == "success"
        return answer["data"]

    with process(command, folder / "log"):
        until(lambda: get(f"http://{address}/-/ready"), 30, "Prometheus")
        until(lambda: len(ask("query", "up == 1")["result"]) == 2, 30, "both targets up")
        statuses = load(base)
        until(
            lambda: ask("query", 'slipstream_requests_total{outcome="ok"}')["result"], 10, "the first scrape after it"
        )
        statuses |= load(base)
        assert {200, 422, 429} == statuses
        yield ask


def has_data(query: Callable[[str, str], Any], expr: str) -> bool:
    """Whether some series of the answer has a number."""
    return any(math.isfinite(float(series["value"][1])) for series in query("query", expr)["result"])


def test_targets_are_up(query: Callable[[str, str], Any]) -> None:
    targets = query("targets", "")["activeTargets"]
    assert {(t["labels"]["job"], t["health"], t["lastError"]) for t in targets} == {
        ("slipstream", "up", ""),
        ("card", "up", ""),
    }


def test_rules_load_and_evaluate(query: Callable[[str, str], Any]) -> None:
    def rules() -> list[dict[str, Any]]:
        found = [rule for group in query("rules", "")["groups"] for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else []

    loaded = until(rules, 15, "one evaluation")
    assert len(loaded) == sum(len(group["rules"]) for group in RULES["groups"])
    assert [rule for rule in loaded if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in loaded if rule.get("state") == "firing"] == []


@pytest.mark.parametrize("record", RECORDED)
def test_recording_rule_has_data(query: Callable[[str, str], Any], record: str) -> None:
    until(lambda: has_data(query, record), 15, record)


@pytest.mark.parametrize("title", dashboard_queries())
def test_panel_has_data(query: Callable[[str, str], Any], title: str) -> None:
    expr = (
        dashboard_queries()[title].replace("$__rate_interval", "1m").replace("$model", ".*").replace("$instance", ".*")
    )
    until(lambda: has_data(query, expr), 15, expr)
