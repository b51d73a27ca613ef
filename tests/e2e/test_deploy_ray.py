"""The deployed Serve file on a local Ray cluster: two replicas, one of which dies under load; another application."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import random
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
PORTS = 4
LONG = 80  # steps: seconds, even on the smallest pipeline


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


def scrape(first: int) -> dict[int, str]:
    """The metrics of each replica of an application, by port."""
    found = {}
    for port in range(first, first + PORTS):
        with contextlib.suppress(httpx.HTTPError):
            found[port] = get(f"http://127.0.0.1:{port}/metrics")
    return found


@dataclass(frozen=True)
class Cluster:
    """A running `serve run`: its process, its address, and the first metrics port of each application."""

    pid: int
    base: str
    metrics: int
    second: int

    def spreads(self) -> bool:
        """Whether two replicas have answered; a request more is sent."""
        post(self.base, prompt="x", num_inference_steps=1)
        return sum(served(text) > 0 for text in scrape(self.metrics).values()) == 2

    def having(self, line: str) -> int:
        """How many replicas have a line in their metrics."""
        return sum(f"\n{line}\n" in text for text in scrape(self.metrics).values())


def local(model: Path, metrics: int) -> dict[str, Any]:
    """serve.yaml with a model of our own and exactly two replicas, and another application beside it."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "ray/serve.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    (app,) = config["applications"]
    settings = {"model": [str(model)], "device": "cpu", "max_rows": 32, "torch_threads": 1}
    app["args"] = {"settings": app["args"]["settings"] | settings, "metrics_port": metrics, "metrics_ports": PORTS}
    (server,) = app["deployments"]
    del server["autoscaling_config"]
    server |= {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}, "graceful_shutdown_timeout_s": 2}
    second = copy.deepcopy(app) | {"name": "second", "route_prefix": "/second"}
    second["args"]["metrics_port"] = metrics + 10
    second["deployments"][0]["num_replicas"] = 1
    config["applications"].append(second)
    return config


@pytest.fixture(scope="module")
def cluster(pipeline_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`serve run` on a Ray of its own."""
    folder = tmp_path_factory.mktemp("ray")
    metrics = random.randrange(21000, 31000, 20)
    config = local(pipeline_dir("sd"), metrics)
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).parent / "serve"), "run", "--app-dir", str(ROOT), str(folder / "serve.yaml")]
    environment = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "app.ray.proxy:middlewares",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    base = f"http://127.0.0.1:{config['http_options']['port']}"
    runs: list[subprocess.Popen[bytes]] = []

    def up() -> bool:
        if not runs or runs[-1].poll() is not None:  # Ray gives its node 30 s to start: too few on a busy machine
            with (folder / "log").open("ab") as log:
                runs.append(
                    subprocess.Popen(
                        command, stdout=log, stderr=log, env=os.environ | environment, start_new_session=True
                    )
                )
        return bool(get(f"{base}/health/ready") and get(f"{base}/second/health/ready"))

    try:
        until(up, 200, "both applications")
        found = Cluster(runs[-1].pid, base, metrics, metrics + 10)
        until(found.spreads, 60, "two replicas that the proxy knows")
        yield found
    except TimeoutError:
        sys.stderr.write((folder / "log").read_text())
        raise
    finally:
        runs[-1].send_signal(signal.SIGINT)
        try:
            runs[-1].wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(runs[-1].pid, signal.SIGKILL)
            runs[-1].wait()


def test_deployed_files_are_valid() -> None:
    code = (
        "import sys, yaml; from ray.serve.schema import ServeDeploySchema as Schema\n"
        "for name in sys.argv[1:]: Schema.model_validate(yaml.safe_load(open(name)))"
    )
    files = [str(DEPLOY / "ray" / name) for name in ("serve.yaml", "serve-models.yaml")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_requests_spread_and_every_replica_is_scraped(cluster: Cluster) -> None:
    before = {port: served(text) for port, text in scrape(cluster.metrics).items()}
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda seed: post(cluster.base, prompt="x", seed=seed, num_inference_steps=8), range(16))
        )
    assert {answer.status_code for answer in answers} == {200}
    assert {len(answer.headers.get_list("x-request-id")) for answer in answers} == {1}

    def counts() -> list[float]:
        return [served(text) - before[port] for port, text in scrape(cluster.metrics).items()]

    until(lambda: sum(counts()) == 16, 10, "the count of the last one")
    assert min(counts()) >= 3


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
    until(lambda: sum(map(served, scrape(cluster.second).values())) == 1, 10, "the count")


def test_killed_replica_costs_its_own_requests_a_retry_and_comes_back(cluster: Cluster) -> None:
    victim, survivor = replicas(cluster.pid)
    with ThreadPoolExecutor(16) as pool:
        plain = [pool.submit(post, cluster.base, prompt="x", num_inference_steps=LONG) for _ in range(8)]
        streams = [pool.submit(post, cluster.base, prompt="x", num_inference_steps=LONG, stream=True) for _ in range(8)]
        until(lambda: cluster.having("slipstream_requests_running 0.0") == 0, 20, "work at both")
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

    until(lambda: cluster.having("slipstream_ready 1.0") == 2, 120, "the replacement")
    assert survivor in replicas(cluster.pid)
    assert {post(cluster.base, prompt="x", num_inference_steps=2).status_code for _ in range(8)} == {200}
