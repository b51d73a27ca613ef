"""A disk that is really full, a small file system of its own: 507, nothing half-written, and what runs goes on."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.errors import StoreFull
from app.jobs.database import StoreError
from app.jobs.files import Files
from app.jobs.queue import Jobs
from app.jobs.store import RESERVE, Store
from models import Backbone
from tests.integration.test_jobs_http import JOBS, Gate, ended, picture, shown, submit
from tests.serving import aio, hooked, serving

MIB = 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    mount = shutil.which("mount")
    done = mount and subprocess.run(command, capture_output=True, text=True, check=False)
    if not done or done.returncode:
        pytest.skip(f"a file system of its own cannot be mounted here: {done.stderr if done else 'no mount'}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int = 0) -> Path:
    """Take all but `left` bytes."""
    filler = disk / "filler"
    with filler.open("ab") as out:
        os.posix_fallocate(out.fileno(), out.seek(0, 2), shutil.disk_usage(disk).free - left)
    return filler


def kept(disk: Path) -> list[str]:
    """Files of the store beside its database."""
    return sorted(str(path.relative_to(disk)) for path in (disk / "store" / "blobs").rglob("*") if path.is_file())


@aio
async def test_a_full_disk_takes_nothing_new_and_finishes_what_it_has(
    student_of: Callable[..., Backbone], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.jobs.runner.RETRY_SECONDS", 0.05)
    gate = Gate()
    async with serving({"sd": hooked(student_of("sd"), gate)}, data_dir=disk / "store") as served:
        first = await submit(served, seed=1)
        before = shown((await served.client.get(f"{(await ended(served, first['id']))['images'][0]['url']}")).content)
        files = kept(disk)
        gate.shut()
        running = await submit(served, seed=1)
        await served.until(lambda: bool(served.app.state.jobs.runner.running))
        fill(disk, RESERVE - MIB)
        for refused in (
            await served.post(JOBS),
            await served.post(JOBS, image=picture(), strength=0.5),
            await served.client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("x", b"x" * MIB)}),
        ):
            assert (refused.status_code, refused.json()["error"]["code"]) == (507, "store_full")
        filler = fill(disk)
        gate.opened.set()
        assert (await served.post()).status_code == 200, "live requests go on"
        writing = served.app.state.jobs.runner.running[running["id"]]
        await served.until(lambda: bool(writing.ended))
        await asyncio.sleep(0.2)  # several tries to write it
        assert (await served.client.get(f"{JOBS}/{running['id']}")).json()["status"] == "in_progress"
        assert kept(disk) == files, "no half of anything"
        filler.unlink()
        done = await ended(served, running["id"])
        assert done["status"] == "completed", "once there is room"
        after = shown((await served.client.get(done["images"][0]["url"])).content)
        assert abs(after - before).max() <= 1
        listed = (await served.client.get(JOBS)).json()["data"]
        assert [job["id"] for job in listed] == [running["id"], first["id"]], "what was refused is not there"
    Store(disk / "store").close()  # which checks the database


def test_a_full_disk_is_told_at_the_start(disk: Path) -> None:
    filler = fill(disk)
    with pytest.raises(StoreError, match=r"full|No space"):
        Store(disk / "store")
    filler.unlink()
    Store(disk / "store").close()


def test_a_file_that_fills_the_disk_is_gone_again(disk: Path) -> None:
    store = Store(disk / "store")
    files, jobs = Files(store), Jobs(store)
    with pytest.raises(StoreFull):  # it says that it is small
        files.add("me", "in.jsonl", (b"x" * MIB for _ in range(64)), size=1)
    assert kept(disk) == []
    assert files.page("me", 10, None, "desc", None) == ([], False)
    assert shutil.disk_usage(disk).free > 40 * MIB
    assert jobs.counts()["queued"] == 0
    store.close()
