"""Fuzzed requests against a server in a process of its own. `slipstream bench fuzz --requests 100000`

Most are nearly right: one field in a few is wrong, a method or a header is odd, a body is cut, packed or no JSON; some
are bytes that are no HTTP, some clients leave. What counts: answers of 5xx other than 504 and 503, answers that never
come, tracebacks, memory over the last half, gauges afterwards. Every request is drawn from `--seed` and its number, so
that one can be sent again alone. Checkpoints go to the table as it runs: what is cut short has said how far it came.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from models.accelerators import REGISTRY
from models.solvers.names import REGISTRY as SCHEDULERS
from tests.bench.attack import MIB, Arena, Target
from tests.bench.harness import note, options, quiet
from tests.bench.report import Report
from tests.pipelines import save_pipeline

CLIENTS = 8
HANG_SECONDS = 60.0
FLAT_MIB = 64.0
"""How much more the server may hold at the end than at half."""
PATHS = ("/generate", "/v1/images/generations", "/v1/images/edits", "/v1/models", "/v1/models/sd", "/accelerators",
         "/health/live", "/health/ready", "/metrics", "/", "/docs", "/openapi.json", "/web/main.js", "/nowhere",
         "/v1/images/jobs", "/v1/files", "/v1/batches", "/web/../../x", "/%00", "/v1/models/%2e%2e")  # fmt: skip
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**63,
    1e308,
    "",
    "x",
    "\x00",
    "é\U0001f600",
    [],
    {},
    [[]],
    {"a": 1},
    "x" * 5000,
)
GAUGES = ("requests_running", "requests_waiting", "feature_memory_bytes", "body_bytes")


def picture(draw: random.Random) -> str:
    """A picture as base64, of any mode, sometimes damaged."""
    out = io.BytesIO()
    mode = draw.choice(["1", "L", "LA", "RGB", "RGBA", "P", "I;16"])
    Image.new(mode, (draw.choice([1, 8, 33]), draw.choice([1, 16]))).save(out, "PNG")
    data = bytearray(out.getvalue())
    if draw.random() < 0.3:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return base64.b64encode(bytes(data)).decode()


def acceleration(draw: random.Random) -> Any:
    """One object of a mode with a parameter or two, or several."""
    mode = draw.choice([*REGISTRY, "warp9"])
    names = [*REGISTRY[mode].model_fields] if mode in REGISTRY else ["interval"]
    values = [1, 2, 3, 0, -1, 0.5, "uniform", [0, 1], None, *ODD[:4]]
    one = {"mode": mode} | {draw.choice(names): draw.choice(values) for _ in range(draw.randrange(3))}
    return [one] * draw.randrange(3) if draw.random() < 0.2 else one


def body(draw: random.Random) -> dict[str, Any]:
    """Nearly right: each field likely as often as not, one in a few odd."""
    likely: dict[str, Any] = {
        "model": draw.choice(["sd", None, "nope"]),
        "width": draw.choice([16, 32, 30, 64]),
        "height": draw.choice([16, 32]),
        "num_inference_steps": draw.choice([1, 2, 2, 3]),
        "num_images": draw.choice([1, 1, 2, 3]),
        "seed": draw.choice([0, 7, 2**62]),
        "guidance_scale": draw.choice([0, 1, 2.5]),
        "scheduler": draw.choice([*SCHEDULERS]),
        "strength": draw.choice([0, 0.5, 1.0]),
        "timestep_warp": draw.choice([0.5, 1, 2]),
        "output_format": draw.choice(["png", "jpeg", "webp"]),
        "stream": draw.random() < 0.3,
        "partial_images": draw.randrange(3),
        "timeout_seconds": draw.choice([None, 30, 0.001]),
    }
    found = {"prompt": draw.choice(["a ring", "", "\x00\x1b", "é" * 50])}
    found |= {name: value for name, value in likely.items() if draw.random() < 0.3}
    if draw.random() < 0.3:
        found["acceleration"] = acceleration(draw)
    if draw.random() < 0.1:
        found["image"] = picture(draw)
    if draw.random() < 0.3:
        found[draw.choice([*likely, "prompt", "image", "acceleration", "x"])] = draw.choice(ODD)
    return found


def content(draw: random.Random) -> tuple[bytes, dict[str, str]]:
    """A body as bytes, and the headers that go with it."""
    data = json.dumps(body(draw)).encode()
    headers = {"Content-Type": "application/json"}
    fate = draw.randrange(20)
    if fate == 0:
        data = data[: draw.randrange(len(data))]
    elif fate == 1:
        data, headers["Content-Encoding"] = gzip.compress(data)[: draw.choice([5, 10_000])], "gzip"
    elif fate == 2:
        headers["Content-Type"] = draw.choice(
            ["text/plain", "multipart/form-data", "multipart/form-data; boundary=x", ""]
        )
    elif fate == 3:
        data = draw.randbytes(draw.randrange(200))
    elif fate == 4:
        headers |= {"Accept": draw.choice(["image/png", "image/*;q=0", "*/*;q=x", ",;,", "x" * 500])}
    elif fate == 5:
        headers["Content-Encoding"] = draw.choice(["br", "gzip", "gzip, gzip", ""])
    return data, headers


RAW = (b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /generate HTTP/1.1\r\nHost: x\r\n"
       b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"POST /generate HTTP/1.1\r\nHost: x\r\n"
       b"Content-Length: -1\r\n\r\n", b"GET /%ff HTTP/1.1\r\nHost: x\r\n\r\n", b"HEAD /metrics HTTP/1.0\r\n\r\n",
       b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"")  # fmt: skip


async def raw(port: int, draw: random.Random) -> str:
    """Bytes that may be no HTTP, some of them cut or turned, then the end of what we say."""
    data = bytearray(draw.choice(RAW) + (draw.randbytes(20) if draw.random() < 0.2 else b""))
    if data and draw.random() < 0.3:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(bytes(data))
        writer.write_eof()
        said = await asyncio.wait_for(reader.read(), HANG_SECONDS)
        return said[9:12].decode("ascii", "replace") if said.startswith(b"HTTP/1.1 ") else "closed"
    except ConnectionError:
        return "closed"
    finally:
        writer.close()


async def leaving(sending: Coroutine[Any, Any, httpx.Response], seconds: float) -> str:
    """Leave after a while, answered or not."""
    try:
        return str((await asyncio.wait_for(sending, seconds)).status_code)
    except TimeoutError:
        return "left"


async def one(client: httpx.AsyncClient, port: int, draw: random.Random) -> str:
    """One request, and how it ended: its status, `closed`, `left`, or `hang`."""
    try:
        if draw.random() < 0.05:
            return await raw(port, draw)
        data, headers = content(draw)
        path = draw.choice(PATHS[:2]) if draw.random() < 0.8 else draw.choice(PATHS)
        method = "POST" if path in PATHS[:3] else draw.choice(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
        sending = client.request(method, path, content=data, headers=headers)
        if draw.random() < 0.02:
            return await leaving(sending, draw.random() * 0.05)
        answer = await asyncio.wait_for(sending, HANG_SECONDS)
    except (TimeoutError, httpx.TimeoutException):
        return "hang"
    except httpx.TransportError:
        return "closed"
    return str(answer.status_code) if answer.status_code < 400 or method == "HEAD" or typed(answer) else "untyped"


def typed(answer: httpx.Response) -> bool:
    """Whether a refusal has our shape."""
    try:
        return set(answer.json()["error"]) == {"message", "type", "param", "code"}
    except (ValueError, KeyError):
        return False


async def run(target: Target, numbers: range, seed: int, ends: Counter[str], odd: list[str]) -> None:
    """Send the requests of these numbers, `CLIENTS` at a time."""
    left = iter(numbers)

    async def work(client: httpx.AsyncClient) -> None:
        for number in left:
            end = await one(client, target.port, random.Random(f"{seed} {number}"))
            ends[end] += 1
            if (end.startswith("5") and end not in ("503", "504", "507")) or end in ("hang", "untyped"):
                odd.append(f"{number}: {end}")

    async with httpx.AsyncClient(base_url=target.url, timeout=HANG_SECONDS) as client:
        await asyncio.gather(*(work(client) for _ in range(CLIENTS)))


def main() -> None:
    """Send them all, a tenth at a time."""
    given = options(__doc__, requests=100_000, seed=0, windows=20)
    quiet()
    report = Report("fuzz", "Fuzzed requests", given)
    total = 400 if given.quick else given.requests
    ends: Counter[str] = Counter()
    odd: list[str] = []
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        small: dict[str, Any] = {"max_steps": 3, "max_images": 3, "max_pixels": 64 * 64, "log_level": "warning"}
        with Arena([str(save_pipeline("sd", Path(folder)))], Path(folder)).server(**small) as target:
            began = time.monotonic()
            size = max(1, total // given.windows)
            for start in range(0, total, size):
                asyncio.run(run(target, range(start, min(start + size, total)), given.seed, ends, odd))
                memory.append(target.resident / MIB)
                rate = sum(ends.values()) / (time.monotonic() - began)
                note(f"{sum(ends.values())} requests, {rate:.0f} a second, {memory[-1]:.0f} MiB, {odd[:5]}")
            time.sleep(3)
            gauges = {name: target.metric(name) for name in GAUGES}
            traces = target.logged.count("Traceback")
            logged = len(target.logged.splitlines())
    half = memory[len(memory) // 2 :]
    growth = half[-1] - half[0]
    report.table(
        "What came of them",
        [
            {"what": "requests", "figure": sum(ends.values()), "limit": total},
            {"what": "5xx but deadlines, hangs, untyped errors", "figure": len(odd), "limit": 0},
            {"what": "tracebacks", "figure": traces, "limit": 0},
            {"what": "log lines at warning and above", "figure": logged, "limit": ""},
            {"what": "MiB more at the end than at half", "figure": round(growth, 1), "limit": FLAT_MIB},
            {"what": "gauges afterwards", "figure": sum(gauges.values()), "limit": 0},
        ],
    )
    report.remark(f"Ends: {dict(sorted(ends.items()))}. Odd ones: {odd[:20]}. Gauges: {gauges}.")
    report.remark(f"Resident MiB by window: {[round(one) for one in memory]}.")
    report.save()
    if odd or traces or growth > FLAT_MIB or any(gauges.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
