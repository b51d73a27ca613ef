"""`slipstream jobs` over a store that no server holds, and beside one that does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.jobs.database import StoreError
from app.jobs.queue import Jobs, NewJob
from app.jobs.store import Store

runner = CliRunner()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with a finished job of two pictures, and two that wait, one of another owner."""
    store = Store(tmp_path / "data")
    jobs = Jobs(store)
    for number, owner in enumerate(("me", "me", "you")):
        jobs.submit(NewJob(owner, {"prompt": f"ring [/b] {number}", "model": "sd", "seed": number}, {}, "f"))
    [claimed] = jobs.leases.claim(1)[0]
    jobs.leases.complete(claimed.row["id"], {"seeds": [0, 1]}, [b"first", b"second"])
    store.close()
    return tmp_path / "data"


def run(*command: str | Path) -> str:
    result = runner.invoke(app, ["jobs", *map(str, command)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def ids(folder: Path, *options: str) -> list[str]:
    text = run("list", "--data-dir", folder, "--json", *options)
    return [json.loads(line)["id"] for line in text.splitlines()]


def test_list(folder: Path) -> None:
    assert len(ids(folder)) == 3
    assert len(ids(folder, "--status", "queued")) == 2
    assert ids(folder, "--limit", "1") == ids(folder)[:1]
    assert "2 queued, 0 in_progress, 1 completed" in run("list", "--data-dir", folder)


def test_show(folder: Path) -> None:
    job = ids(folder, "--status", "completed")[0]
    shown = json.loads(run("show", job, "--data-dir", folder))
    assert (shown["status"], shown["body"]["prompt"], shown["result"]) == (
        "completed",
        "ring [/b] 0",
        {"seeds": [0, 1]},
    )


def test_cancel_beside_a_server(folder: Path) -> None:
    server = Store(folder)
    jobs = Jobs(server)
    [claimed] = jobs.leases.claim(1)[0]
    waiting = ids(folder, "--status", "queued")[0]
    assert run("cancel", waiting, "--data-dir", folder).strip() == "cancelled"
    assert "asked to stop" in run("cancel", claimed.row["id"], "--data-dir", folder)
    assert jobs.leases.renew({claimed.row["id"]: (0, 0)}) == {claimed.row["id"]}, "the server is told"
    assert jobs.get(waiting, None)["status"] == "cancelled"
    server.close()


def test_export(folder: Path, tmp_path: Path) -> None:
    job = ids(folder, "--status", "completed")[0]
    for name, chosen in (("all", []), ("one", [job])):
        run("export", *chosen, "-o", tmp_path / name, "--data-dir", folder)
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == [
            f"{job}-0.png",
            f"{job}-1.png",
            f"{job}.json",
        ]
        assert (tmp_path / name / f"{job}-1.png").read_bytes() == b"second"


def test_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    commands: list[list[str | Path]] = [["list", "--data-dir", tmp_path], ["show", "job-x", "--data-dir", folder]]
    for command in commands:
        with pytest.raises(StoreError, match="there is no"):
            run(*command)
    assert not (tmp_path / "jobs.sqlite3").exists()
