"""Attacks on the server's edge: signals, ports, half-open connections, bodies, framing, logs."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from tests.bench.attack import MIB, PROMPT, START_SECONDS, Arena, Outcome, Target, attack, free_port, until

SMALL: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2}


@attack(3, quick=True)
def second_signal(arena: Arena) -> Outcome:
    """A second SIGTERM with work open."""
    with arena.server(drain_seconds=600) as target:
        clients = target.busy(6)
        code = target.stop(signal.SIGTERM, signal.SIGTERM)
        typed = sum(client.ended().typed for client in clients)
        traces = target.logged.count("Traceback")
    held = (code, typed, traces) == (143, 6, 0)
    return Outcome(
        f"exit {code}, {typed} of 6 answers typed, {traces} tracebacks", "exit 143, 6 of 6, 0 tracebacks", held
    )


@attack(3, quick=True)
def port_taken(arena: Arena) -> Outcome:
    """A port that is taken already."""
    with arena.server(ready=False) as target:
        began = time.monotonic()
        second = subprocess.run(arena.command(port=target.port), capture_output=True, text=True, timeout=120)
        seconds = time.monotonic() - began
    lines = second.stderr.strip().splitlines()
    said = len(lines) == 1 and f"port {target.port}" in lines[0] and "--port" in lines[0]
    figure = f"exit {second.returncode}, {len(lines)} lines, {seconds:.1f} s"
    return Outcome(figure, "exit 1, 1 line naming port and remedy", second.returncode == 1 and said)


def head(length: int, *more: str, path: str = "/generate") -> bytes:
    """The head of a request with a JSON body."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


def heard(connection: socket.socket, seconds: float = 30.0) -> bytes:
    """All that is said on a connection until it is closed; raises where it is not in time."""
    connection.settimeout(seconds)
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def pour(connection: socket.socket, data: bytes) -> None:
    """Send what is taken; one that refuses may have closed."""
    try:
        connection.sendall(data)
    except OSError:
        return


@attack(5)
def silent_uploads(arena: Arena) -> Outcome:
    """80 clients that send 20 of 25 MB each and then nothing."""
    with arena.server(body_seconds=3) as target:
        before = target.resident
        connections = [target.connect() for _ in range(80)]
        length = 20 * 10**6
        for connection in connections:
            connection.settimeout(5)
            pour(connection, head(25 * 10**6 - 10**6, "X-Slow: 1") + b" " * length)
        grown = (target.resident - before) / MIB
        began = time.monotonic()
        answers = [heard(connection, 60) for connection in connections]
        closed = time.monotonic() - began
        target.until(lambda: target.metric("body_bytes") == 0)
        works = httpx.post(f"{target.url}/generate", json=SMALL, timeout=60).status_code
    typed = sum(answer.startswith((b"HTTP/1.1 408", b"HTTP/1.1 503")) for answer in answers)
    figure = f"{grown:.0f} MiB more, all closed after {closed:.0f} s, {typed} typed, then {works}"
    return Outcome(figure, "512 MiB, 30 s", grown < 512 and closed < 30 and works == 200)


@attack(5, quick=True)
def half_open(arena: Arena) -> Outcome:
    """1,500 half-open connections, and then SIGTERM."""
    with arena.server(max_connections=500, head_seconds=600, body_seconds=600) as target:
        connections = []
        for i in range(1500):
            connections.append(target.connect())
            pour(connections[-1], (b"", b"GET / HT", head(1000) + b"{")[i % 3] if i < 1450 else head(1000) + b"{")
        target.until(lambda: target.metric("connections") <= 501)
        works = httpx.post(f"{target.url}/generate", json=SMALL, timeout=60).status_code
        began = time.monotonic()
        code = target.stop(signal.SIGTERM)
        seconds, traces = time.monotonic() - began, target.logged.count("Traceback")
        lines = len(target.logged.splitlines())
    for connection in connections:
        connection.close()
    figure = f"answered {works}, drained in {seconds:.1f} s with {code}, {traces} tracebacks, {lines} log lines"
    held = (works, code, traces) == (200, 0, 0) and seconds < 5
    return Outcome(figure, "200, 5 s, exit 0, no traceback", held)


@attack(5)
def slow_heads(arena: Arena) -> Outcome:
    """300 heads that come a byte a second."""
    with arena.server(head_seconds=3) as target:
        connections = [target.connect() for _ in range(300)]
        began = time.monotonic()
        for second in range(6):
            for connection in connections:
                pour(connection, b"GET / HTTP/1.1\r\n"[second : second + 1])
            time.sleep(1)
        answers = [heard(connection, 20) for connection in connections]
        seconds = time.monotonic() - began
    typed = sum(answer.startswith(b"HTTP/1.1 408") for answer in answers)
    return Outcome(
        f"{typed} of 300 told so, all closed after {seconds:.0f} s", "300, 15 s", typed == 300 and seconds < 15
    )


@attack(5)
def no_descriptors(arena: Arena) -> Outcome:
    """More connections than the system has descriptors for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))

    def starve(target: Target) -> None:
        resource.prlimit(target.process.pid, resource.RLIMIT_NOFILE, (200, 200))

    try:
        with arena.server(max_connections=2000, head_seconds=3) as target:
            starve(target)
            connections = [target.connect() for _ in range(800)]
            time.sleep(4)
            lines = len(target.logged.splitlines())
            for connection in connections:
                connection.close()
            seconds = target.until(lambda: _alive(target), 30)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return Outcome(
        f"{lines} log lines, alive again after {seconds:.1f} s", "50 lines, 10 s", lines < 50 and seconds < 10
    )


def _alive(target: Target) -> bool:
    try:
        return httpx.get(f"{target.url}/health/live", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@attack(7)
def odd_pictures(arena: Arena) -> Outcome:
    """A 16-bit grey picture and a transparent one make what the same in 8 bits and on white make."""
    grey, glass = Image.new("I;16", (16, 16), 128 * 257), Image.new("RGBA", (16, 16), (0, 0, 0, 51))
    plain = Image.new("L", (16, 16), 128), Image.new("RGB", (16, 16), (204, 204, 204))
    with arena.server() as target:
        made = [_from_picture(target, picture) for picture in (grey, plain[0], glass, plain[1])]
    alike = [made[0] == made[1], made[2] == made[3], made[1] != made[3]]
    return Outcome(f"{sum(alike)} of 3 as expected", "3", all(alike))


def _from_picture(target: Target, picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    body = SMALL | {
        "image": base64.b64encode(out.getvalue()).decode(),
        "seed": 3,
        "strength": 0.6,
        "output_format": "jpeg",
    }
    answer = httpx.post(f"{target.url}/generate", json=body, timeout=60)
    return str(answer.json()["images"][0]["b64_json"]).encode()


@attack(8)
def framed_twice(arena: Arena) -> Outcome:
    """Content-Length beside Transfer-Encoding, with a second request in the body."""
    with arena.server(ready=False) as target, target.connect() as connection:
        inner = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        pour(connection, head(5, "Transfer-Encoding: chunked") + b"0\r\n\r\n" + inner)
        said = heard(connection)
    answers = said.count(b"HTTP/1.1 ")
    held = answers == 1 and said.startswith(b"HTTP/1.1 400") and b'"malformed"' in said
    return Outcome(f"{answers} answer, {said[9:12].decode()}, closed", "1, 400, closed", held)


@attack(8)
def long_words(arena: Arena) -> Outcome:
    """20 MB where a name belongs, and control characters for the terminal that shows the log."""
    word = "x" * (20 * 10**6)
    with arena.server(log_format="human", log_level="info") as target:
        url, sizes = f"{target.url}/generate", []
        for more in ({"model": word}, {"scheduler": word}, {word: 1}, {"acceleration": {"mode": word}}):
            answer = httpx.post(url, json=SMALL | more, timeout=60)
            sizes.append(len(answer.content) if answer.status_code in (404, 422) else 10**9)
        httpx.post(url, json=SMALL | {"model": "a\x1b[2Jb\n12:00:00 INFO    forged"}, timeout=60)
        httpx.get(f"{target.url}/%1b%0a12:00:00 INFO    forged", timeout=60)
        until(lambda: target.logged.count("forged") >= 2)
        lines = target.logged.splitlines()
    control, forged = "\x1b" in "".join(lines), sum(line.startswith("12:00:00 INFO    forged") for line in lines)
    longest = max(map(len, lines))
    figure = f"answers of {max(sizes)} bytes, lines of {longest}, {forged} forged" + ", ESC" * control
    return Outcome(figure, "2,000, 2,000, 0", max(sizes) < 2000 and longest < 2000 and not forged and not control)


@attack(10, quick=True)
def small_print(arena: Arena) -> Outcome:
    """What clients may do and seldom do: HEAD, Accept with q, gzip, a half-closed connection, a key beyond ASCII."""
    key, found = "schlüssel-ключ", {}
    with arena.server(api_keys=key) as target:
        with httpx.Client(
            base_url=target.url, timeout=60, headers={b"Authorization": f"Bearer {key}".encode()}
        ) as client:
            found["key"] = client.get("/v1/models").status_code == 200
            found["HEAD"] = client.head("/v1/models").status_code == 200
            allow = client.get("/generate").headers.get("allow", "")
            found["Allow"] = "POST" in allow
            accepted = client.post("/generate", json=SMALL, headers={"Accept": "image/png;q=0.1, application/json"})
            found["q"] = accepted.headers["content-type"].startswith("application/json")
            packed = gzip.compress(json.dumps(SMALL).encode())
            headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
            found["gzip"] = client.post("/generate", content=packed, headers=headers).status_code == 200
            bomb = gzip.compress(b" " * (64 * MIB))
            found["bomb"] = client.post("/generate", content=bomb, headers=headers).status_code == 413
            name = client.get("/v1/models").json()["data"][0]["id"]
            found["one model"] = client.get(f"/v1/models/{name}").json().get("id") == name
            top = client.post("/generate", json=SMALL | {"seed": 2**63 - 2})
            found["seed"] = top.status_code == 200
        found["docs"] = all(httpx.get(f"{target.url}{path}").status_code == 200 for path in ("/docs", "/openapi.json"))
        with target.connect() as connection:
            data = json.dumps(SMALL).encode()
            connection.sendall(head(len(data), f"Authorization: Bearer {key}") + data)
            connection.shutdown(socket.SHUT_WR)
            found["half-closed"] = b"HTTP/1.1 200" in heard(connection)
    broken = [name for name, held in found.items() if not held]
    return Outcome(f"broken: {', '.join(broken) or 'none'}", "none", not broken)


@attack(10)
def log_in_no_folder(arena: Arena) -> Outcome:
    """--log-file in a folder that is missing."""
    command = arena.command(port=free_port(), log_file="/nowhere/at/all/log")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS)
    said = ended.stderr.strip().splitlines()
    held = ended.returncode == 2 and len(said) == 1 and "--log-file" in said[0]
    return Outcome(f"exit {ended.returncode}, {len(said)} line", "exit 2, 1 line", held)


@attack(12, quick=True)
def unread_log(arena: Arena) -> Outcome:
    """Standard error is a pipe that nobody reads."""
    port = free_port()
    out, into = os.pipe()
    process = subprocess.Popen(arena.command(port=port, log_level="debug"), stderr=into)
    os.close(into)
    target = Target(f"http://127.0.0.1:{port}", port, process, Path(os.devnull))
    try:
        until(lambda: _alive(target), START_SECONDS)
        asked, slowest = 0, 0.0
        with httpx.Client(base_url=target.url, timeout=10) as client:
            while target.metric("log_lines_lost_total") == 0 and asked < 20_000:
                for _ in range(500):
                    began = time.monotonic()
                    client.get(f"/nowhere/{'x' * 300}").close()
                    slowest = max(slowest, time.monotonic() - began)
                asked += 500
            lost = target.metric("log_lines_lost_total")
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(out)
    figure = f"{asked} requests, slowest {slowest:.2f} s, {lost:.0f} lines lost and counted, exit {code}"
    return Outcome(figure, "all answered, 2 s, counted, exit 0", slowest < 2 and lost > 0 and code == 0)
