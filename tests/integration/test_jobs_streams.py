"""A batch's file is read, and its output written, as streams: what that holds in memory does not grow with them."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.jobs.batches import Batches
from app.jobs.files import CONTENT, Files
from app.jobs.outcome import Outcome
from app.jobs.queue import Jobs, NewJob
from app.jobs.store import Store

MIB = 2**20
ENDPOINT = "/v1/images/generations"
LINES, LINE_BYTES, PICTURE = 48, 400_000, b"p" * 300_000


def file_of(lines: int) -> Iterator[bytes]:
    for number in range(lines):
        asked = {"prompt": "x" * LINE_BYTES}
        yield json.dumps({"custom_id": f"{number}", "method": "POST", "url": ENDPOINT, "body": asked}).encode() + b"\n"


def peak() -> float:
    """The most that was held since the last time, in MiB."""
    most = tracemalloc.get_traced_memory()[1] / MIB
    tracemalloc.reset_peak()
    return most


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_files_of_batches_are_streams(tmp_path: Path, traced: None) -> None:
    """19 MB of lines, 14 MB of pictures: never more than a few chunks at a time."""
    store = Store(tmp_path)
    files, jobs = Files(store), Jobs(store)
    batches = Batches(store, jobs, keep_seconds=3600)
    began = peak()
    row = files.add("me", "in.jsonl", file_of(LINES), size=0)
    assert row["size"] > LINES * LINE_BYTES
    batch = batches.create("me", ENDPOINT, row["id"], "24h", None)
    batches.validate(batch, 50_000, MIB)
    while (batch := batches.get(batch["id"], "me"))["line"] < LINES:
        assert batch["total"] == LINES
        found = batches.next_lines(batch, 4, MIB)
        new = [job_of(batch, batch["line"] + i, json.loads(line)) for i, (_, line) in enumerate(found)]
        batches.feed(batch, new, found[-1][0])
        for claimed in jobs.leases.claim(4)[0]:
            assert jobs.leases.complete(claimed.row["id"], RESULT, [PICTURE])
    Outcome(batches).finalize(batch, "completed", MIB)
    held = peak() - began
    output = batches.get(batch["id"], "me")["output_file_id"]
    written = b"".join(store.read(output, CONTENT))
    size = len(written)
    assert size > LINES * len(PICTURE)
    ids = [json.loads(line)["custom_id"] for line in written.splitlines()]
    assert ids == [str(number) for number in range(LINES)]
    assert held < 12, f"{held:.1f} MiB for files of {row['size'] / MIB:.0f} and {size / MIB:.0f} MiB"
    store.close()


RESULT = {"width": 32, "height": 32, "seeds": [1]}


def job_of(batch: Any, number: int, line: Any) -> NewJob:
    body = {"model": "sd", "prompt": line["body"]["prompt"][:10], "seed": 1}
    of_batch = {"batch_id": batch["id"], "line": number, "custom_id": line["custom_id"]}
    return NewJob("me", body, {}, "", "batch", **of_batch)
