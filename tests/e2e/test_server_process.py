"""The server as a process of its own, over real sockets: start, curl, streaming, SIGTERM, bad models."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

PROMPT = "a large red circle on a white background"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(log: Path, *models: Path, **settings: Any) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`slipstream serve` on a free port, ready."""
    port = free_port()
    given = {"PORT": port, "MODEL": ",".join(map(str, models)), "TORCH_THREADS": 1, "MAX_ROWS": 8, "LOG_FORMAT": "json"}
    given |= {name.upper(): value for name, value in settings.items()}
    environment = os.environ | {f"SLIPSTREAM_{name}": str(value) for name, value in given.items()}
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "app.cli", "serve"], env=environment, stderr=out)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            try:
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        else:
            raise TimeoutError(log.read_text())
        yield url, process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_a_life(pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with server(log, pipeline_dir("sd"), api_keys="key", drain_seconds=60) as (url, process):
        # curl writes a PNG
        body = json.dumps({"prompt": PROMPT, "num_inference_steps": 3})
        command = ["curl", "-sf", f"{url}/generate", "-H", "Content-Type: application/json", "-H", "Accept: image/png"]
        command += ["-H", "Authorization: Bearer key", "-H", "X-Request-Id: from-curl", "-d", body]
        command += ["-o", str(tmp_path / "a.png")]
        subprocess.run(command, check=True)
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.size == (32, 32)

        # the openai client streams as it happens
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0)
        stream = client.images.generate(
            prompt=PROMPT, stream=True, partial_images=2, extra_body={"num_inference_steps": 60}
        )
        arrived = [(event.type.split(".")[1], time.monotonic()) for event in stream]
        assert [name for name, _ in arrived] == ["partial_image", "partial_image", "completed"]
        assert arrived[0][1] < arrived[2][1]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="bad", max_retries=0).images.generate(prompt=PROMPT)

        # a client that leaves frees its place
        headers = {"Authorization": "Bearer key"}
        long = {"prompt": PROMPT, "num_inference_steps": 250, "num_images": 10}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/generate", json=long, headers=headers, timeout=0.3)
        deadline = time.monotonic() + 10
        while "requests_running 1.0" in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)

        # SIGTERM finishes what was accepted, refuses the rest, ends with 0
        answers: list[httpx.Response] = []

        def ask(stream: bool) -> None:
            body = {"prompt": PROMPT, "num_inference_steps": 120, "stream": stream}
            answers.append(httpx.post(f"{url}/generate", json=body, headers=headers, timeout=60))

        clients = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in clients:
            thread.start()
        while "requests_running 2.0" not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/health/ready").status_code == 200:
            time.sleep(0.02)
        refused = httpx.post(f"{url}/generate", json={"prompt": ""}, headers=headers)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        for thread in clients:
            thread.join()
        assert process.wait(timeout=30) == 0
        plain, streamed = sorted(answers, key=lambda a: "event-stream" in a.headers["content-type"])
        assert plain.status_code == 200
        assert Image.open(io.BytesIO(base64.b64decode(plain.json()["images"][0]["b64_json"])))
        assert "event: completed" in streamed.text
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["logger"] == "slipstream.request" and "model" in line]
    assert any(line["request_id"] == "from-curl" and line["outcome"] == "ok" for line in requests)
    assert any(line["outcome"] == "cancelled" and line["status"] == 499 for line in requests)
    assert PROMPT not in log.read_text(), "prompts are not logged"


def test_a_drain_is_bounded(pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    with server(tmp_path / "log", pipeline_dir("sd"), drain_seconds=0.5) as (url, process):
        answers: list[httpx.Response] = []
        body = {"prompt": PROMPT, "num_inference_steps": 250, "num_images": 10}
        thread = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/generate", json=body, timeout=60)))
        thread.start()
        while "requests_running 1.0" not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        thread.join()
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["code"] == "draining"


def test_a_second_signal_does_not_wait(pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    with server(tmp_path / "log", pipeline_dir("sd"), drain_seconds=600) as (url, process):
        ends: list[httpx.Response | httpx.TransportError] = []
        body = {"prompt": PROMPT, "num_inference_steps": 250, "num_images": 10}

        def ask() -> None:
            try:
                ends.append(httpx.post(f"{url}/generate", json=body, timeout=60))
            except httpx.TransportError as error:
                ends.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        while "requests_running 1.0" not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/health/ready").status_code == 200:
            time.sleep(0.02)
        assert process.poll() is None, "the first one waits"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
        thread.join()
        assert isinstance(ends[0], httpx.Response), "everybody is answered"
        assert (ends[0].status_code, ends[0].json()["error"]["code"]) == (503, "draining")


def test_a_model_that_cannot_be_loaded_stops_the_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "app.cli", "serve", "--model", str(tmp_path), "--port", str(free_port())]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "model_index.json" in ended.stderr
