"""The deployed Serve file on a local Ray cluster: two replicas, one of which dies under load; another application."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy import DEPLOY, ROOT, free_port, get, post, until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install '.[cluster]'"),
]
LONG = 120  # steps: seconds, even on the smallest pipeline


def events(body: str) -> list[tuple[str, Any]]:
    """The events of a stream with their data."""
    found = re.findall(r"event: (\S+)\r?\ndata: (.*?)\r?\n", body)
    return [(name, json.loads(data)) for name, data in found]


def replicas(ancestor: int) -> list[int]:
    """Process ids of the replicas of `slipstream` that a process started."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue

    def below(pid: int) -> bool:
        return pid == ancestor or (pid in parents and below(parents[pid]))

    return [pid for pid, title in titles.items() if title.startswith("ray::ServeReplica:slipstream:") and below(pid)]


def served(text: str) -> float:
    """Successful requests in a replica's metrics."""
    return sum(map(float, re.findall(r'slipstream_requests_total\{[^}]*outcome="ok"[^}]*\} (\S+)', text)))


@dataclass(frozen=True)
class Cluster:
    """A running `serve run`: its process, its address, and the first metrics port of each application."""

    pid: int
    base: str
    metrics: int
    second: int

    def scrape(self, index: int) -> str:
        """The metrics of one replica."""
        return get(f"http://127.0.0.1:{self.metrics + index}/metrics")

    def spreads(self) -> bool:
        """Whether both replicas have answered; a request more is sent."""
        post(self.base, prompt="x", num_inference_steps=1)
        return all(served(self.scrape(index)) for index in range(2))

    def ready(self) -> int:
        """How many replicas are ready, by their own metrics."""
        found = 0
        for index in range(4):
            try:
                found += "\nslipstream_ready 1.0" in self.scrape(index)
            except httpx.HTTPError:
                continue
        return found


@pytest.fixture(scope="module")
def cluster(pipeline_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """serve.yaml with the smallest pipeline, exactly two replicas, and another application beside it."""
    config = yaml.safe_load((DEPLOY / "ray/serve.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    (app,) = config["applications"]
    settings = {"model": [str(pipeline_dir("sd"))], "device": "cpu", "max_rows": 32, "torch_threads": 1}
    app["args"] = {"settings": app["args"]["settings"] | settings, "metrics_port": 21808, "metrics_ports": 4}
    (server,) = app["deployments"]
    del server["autoscaling_config"]
    server |= {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}, "graceful_shutdown_timeout_s": 2}
    second = json.loads(json.dumps(app)) | {"name": "second", "route_prefix": "/second"}
    second["args"]["metrics_port"] = 21818
    second["deployments"][0]["num_replicas"] = 1
    config["applications"].append(second)

    folder = tmp_path_factory.mktemp("ray")
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "app.proxy:middlewares",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }
    base = f"http://127.0.0.1:{config['http_options']['port']}"
    with (folder / "log").open("wb") as log:
        command = [
            str(Path(sys.executable).parent / "serve"),
            "run",
            "--app-dir",
            str(ROOT),
            str(folder / "serve.yaml"),
        ]
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        found = Cluster(child.pid, base, app["args"]["metrics_port"], second["args"]["metrics_port"])
        until(lambda: get(f"{base}/health/ready") and get(f"{base}/second/health/ready"), 150, "both applications")
        until(found.spreads, 60, "two replicas that the proxy knows")
        yield found
    except TimeoutError:
        sys.stderr.write((folder / "log").read_text())
        raise
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def test_deployed_files_are_valid() -> None:
    code = (
        "import sys, yaml; from ray.serve.schema import ServeDeploySchema as Schema\n"
        "for name in sys.argv[1:]: Schema.model_validate(yaml.safe_load(open(name)))"
    )
    files = [str(DEPLOY / "ray" / name) for name in ("serve.yaml", "serve-models.yaml")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_requests_spread_and_every_replica_is_scraped(cluster: Cluster) -> None:
    before = [served(cluster.scrape(index)) for index in range(2)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda seed: post(cluster.base, prompt="x", seed=seed, num_inference_steps=8), range(16))
        )
    assert {answer.status_code for answer in answers} == {200}
    assert {len(answer.headers.get_list("x-request-id")) for answer in answers} == {1}
    counts = [served(cluster.scrape(index)) - before[index] for index in range(2)]
    assert sum(counts) == 16
    assert min(counts) >= 3


def test_the_same_seed_gives_the_same_image_on_any_replica(cluster: Cluster) -> None:
    answers = [post(cluster.base, prompt="x", seed=5, num_inference_steps=4) for _ in range(6)]
    assert len({answer.json()["images"][0]["b64_json"] for answer in answers}) == 1


def test_stream_arrives_as_it_is_made(cluster: Cluster) -> None:
    body = {"prompt": "x", "num_inference_steps": LONG, "stream": True}
    with httpx.stream("POST", f"{cluster.base}/generate", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        parts = list(response.iter_text())
    assert len(parts) > 20, "as it is made"
    names = [name for name, _ in events("".join(parts))]
    assert names[0] == "queued"
    assert names.count("progress") > 20
    assert names[-1] == "completed"


def test_second_application_has_its_own_path_and_replica(cluster: Cluster) -> None:
    assert post(f"{cluster.base}/second", prompt="x", num_inference_steps=2).status_code == 200
    assert served(get(f"http://127.0.0.1:{cluster.second}/metrics")) == 1


def test_killed_replica_costs_its_own_requests_a_retry_and_comes_back(cluster: Cluster) -> None:
    victim, survivor = replicas(cluster.pid)
    with ThreadPoolExecutor(16) as pool:
        plain = [pool.submit(post, cluster.base, prompt="x", num_inference_steps=LONG) for _ in range(8)]
        streams = [pool.submit(post, cluster.base, prompt="x", num_inference_steps=LONG, stream=True) for _ in range(8)]
        until(lambda: all("\nslipstream_requests_running 0.0" not in cluster.scrape(i) for i in range(2)), 20, "work")
        os.kill(victim, signal.SIGKILL)
        answers = [call.result() for call in plain]
        ends = [events(call.result().text)[-1] for call in streams]
    lost = [answer for answer in answers if answer.status_code != 200]
    for answer in lost:
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["x-request-id"]
    cut = [data for name, data in ends if name != "completed"]
    errors = [answer.json()["error"] for answer in lost] + [data["error"] for data in cut]
    assert {error["code"] for error in errors} == {"replica_lost"}
    assert 3 <= len(errors) <= 13, "half of sixteen, more or less"

    until(lambda: cluster.ready() == 2, 120, "the replacement")
    assert survivor in replicas(cluster.pid)
    assert {post(cluster.base, prompt="x", num_inference_steps=2).status_code for _ in range(8)} == {200}
