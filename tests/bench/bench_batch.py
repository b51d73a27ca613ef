"""A batch of 50,000 lines through a server of its own process: memory while it is sent, checked, run and written.

After `--run` finished lines the batch is cancelled, and its 50,000 lines go into the output and error files;
`--whole` runs all of them; `--store` has no server and draws nothing: a file of the largest size
through the store alone.
`slipstream bench batch`
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from app.jobs.batches import Batches
from app.jobs.files import CONTENT, Files
from app.jobs.outcome import Outcome
from app.jobs.queue import Jobs
from app.jobs.store import Store
from tests.bench.harness import ROOT
from tests.drill import PROMPTS, Server, running
from tests.pipelines import save_pipeline

ENDPOINT = "/v1/images/generations"
MIB = 2**20


def main() -> None:
    """Send, run and read back; print the peak of the server's memory in each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--run", type=int, default=500, help="Lines that are finished before the batch is cancelled.")
    parser.add_argument("--whole", action="store_true", help="Run all lines.")
    parser.add_argument("--store", action="store_true", help="The store alone, lines of 4 KB.")
    parser.add_argument("--quick", action="store_true", help="A smoke run.")
    asked = parser.parse_args()
    if asked.quick:
        asked.lines, asked.run = 300, 20
    with tempfile.TemporaryDirectory(prefix="slipstream-batch-") as name:
        folder = Path(name)
        if asked.store:
            print(through_the_store(folder, asked.lines))
            return
        server = Server(
            {"model": save_pipeline("sd", folder), "data_dir": folder / "data"}, folder / "log", forked=True
        )
        with running([server]), httpx.Client(base_url=server.url, timeout=600) as http:
            text = measure(server, http, folder / "in.jsonl", asked.lines, None if asked.whole else asked.run)
    print(text)
    target = ROOT / "runs" / "bench" / "batch.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n")


def through_the_store(folder: Path, lines: int) -> str:
    """Keep, check, cancel and write out a batch of lines of 4 KB: the peak of this process's memory after each."""
    store = Store(folder)
    batches = Batches(store, Jobs(store), keep_seconds=3600)

    def file() -> Iterator[bytes]:
        for number in range(lines):
            asked = {"custom_id": f"{number}", "method": "POST", "url": ENDPOINT, "body": {"prompt": "x" * 3900}}
            yield json.dumps(asked).encode() + b"\n"

    def peak() -> str:
        return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"

    told = [f"at rest: {peak()}"]
    row = Files(store).add("me", "in.jsonl", file(), size=0)
    told.append(f"kept, {row['size'] / MIB:.0f} MiB: {peak()}")
    batch = batches.create("me", ENDPOINT, row["id"], "24h", None)
    batches.validate(batch, lines, MIB)
    told.append(f"checked: {peak()}")
    batches.cancel(batch["id"], "me")
    Outcome(batches).finalize(batches.get(batch["id"], "me"), "cancelled", MIB)
    written = store.read(batches.get(batch["id"], "me")["error_file_id"], CONTENT)
    count = sum(chunk.count(b"\n") for chunk in written)
    told.append(f"{count} lines written: {peak()}")
    store.close()
    return "\n".join(told)


def measure(server: Server, http: httpx.Client, path: Path, lines: int, run: int | None) -> str:
    """What the server held in each part; `run`: the lines after which the batch is cancelled."""
    with path.open("w") as out:
        for number in range(lines):
            body = {"prompt": PROMPTS[number % 3], "num_inference_steps": 1, "seed": number}
            out.write(json.dumps({"custom_id": f"{number}", "method": "POST", "url": ENDPOINT, "body": body}) + "\n")
    file: dict[str, Any] = {}
    batch: dict[str, Any] = {}
    found: dict[str, int] = {}

    def send() -> None:
        with path.open("rb") as data:
            answer = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", data)})
        file.update(answer.raise_for_status().json())

    def check() -> None:
        wanted = {"input_file_id": file["id"], "endpoint": ENDPOINT, "completion_window": "168h"}
        batch.update(http.post("/v1/batches", json=wanted).raise_for_status().json())
        until(lambda now: now["status"] != "validating")

    def until(done: Callable[[dict[str, Any]], bool]) -> None:
        while not done(batch):
            time.sleep(0.2)
            batch.update(http.get(f"/v1/batches/{batch['id']}").raise_for_status().json())

    def work() -> None:
        until(lambda now: now["request_counts"]["completed"] >= (lines if run is None else run))

    def write() -> None:
        if run is not None:
            http.post(f"/v1/batches/{batch['id']}/cancel").raise_for_status()
        until(lambda now: now["status"] in ("completed", "cancelled"))

    def read() -> None:
        for name in ("output_file_id", "error_file_id"):
            if batch[name] is not None:
                with http.stream("GET", f"/v1/files/{batch[name]}/content") as answer:
                    found[name] = sum(1 for _ in answer.iter_lines())

    assert server.process is not None
    process = Path(f"/proc/{server.process.pid}")
    parts = {"at rest": lambda: None, "sent": send, "checked": check, "run": work, "written": write, "read back": read}
    told = []
    for part, do in parts.items():
        (process / "clear_refs").write_text("5")  # the peak begins anew
        began = time.monotonic()
        do()
        fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        told.append(f"{part}: peak {int(fields['VmHWM'].split()[0]) / 1024:.0f} MiB, {time.monotonic() - began:.1f} s")
    if sum(found.values()) != lines:
        raise RuntimeError(f"{found} are not {lines} lines")
    counts = batch["request_counts"]
    head = f"{lines} lines, {path.stat().st_size / MIB:.1f} MiB: {batch['status']} with {counts['completed']} done"
    return "\n".join([head, *told])


if __name__ == "__main__":
    main()
