"""The store, on SQLite and a real PostgreSQL: what is accepted stays, one server runs it, what is over is forgotten."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from app.errors import Conflict, IdempotencyConflict, Internal, NotFound, QueueFull, StoreFull, StoreUnavailable
from app.jobs import database
from app.jobs import store as store_module
from app.jobs.database import StoreError
from app.jobs.queue import Jobs, NewJob
from app.jobs.retention import Retention
from app.jobs.store import Store
from app.jobs.tables import BLOBS, JOBS, METADATA
from tests.postgres import postgres


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def server() -> Iterator[Callable[[], str]]:
    """Starts PostgreSQL when it is first asked for."""
    running = postgres()
    url: list[str] = []

    def start() -> str:
        if not url:
            url.append(running.__enter__())
        return url[0]

    yield start
    if url:
        running.__exit__(None, None, None)


Open = Callable[..., Store]


@pytest.fixture(params=["sqlite", "postgresql"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, server: Callable[[], str]) -> Iterator[Open]:
    """Opens an empty store, and then the same again: of SQLite as after the end of the process that held it."""
    stores: list[Store] = []
    if request.param == "postgresql":
        admin = sa.create_engine(server(), isolation_level="AUTOCOMMIT")
        name = f"test{abs(hash(request.node.name))}"
        with admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        admin.dispose()

    def open_store(**options: Any) -> Store:
        if request.param == "postgresql":
            stores.append(Store(url=server().replace("/postgres?", f"/{name}?"), **options))
        else:
            for store in stores:
                store.close()
            stores[:] = [Store(tmp_path / "data", **options)]
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def new(**changes: Any) -> NewJob:
    return NewJob(**{"owner": "me", "body": {"prompt": "a ring"}, "digests": {}, "fingerprint": "f"} | changes)


def ids(rows: Any) -> list[str]:
    return [row["id"] for row in rows]


def test_the_migrations_make_the_tables(opened: Open) -> None:
    store = opened()
    with store.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_what_is_accepted_is_there_after_the_process(opened: Open) -> None:
    job, fresh = Jobs(opened()).submit(new(body={"seed": 2**62, "prompt": "é"}, uploads={"image": b"\x00" * 3_000_000}))
    assert fresh
    store = opened()
    found = Jobs(store).get(job["id"], "me")
    assert found["body"] == {"seed": 2**62, "prompt": "é"}
    assert found["size"] == 3_000_000
    assert b"".join(store.read(job["id"], "image")) == b"\x00" * 3_000_000
    assert b"".join(store.read(job["id"], "image", 2_999_990)) == b"\x00" * 10


def test_the_same_key_is_the_same_job(opened: Open) -> None:
    jobs = Jobs(opened())
    first, _ = jobs.submit(new(idempotency_key="k"))
    again, fresh = jobs.submit(new(idempotency_key="k"))
    assert (again["id"], fresh) == (first["id"], False)
    with pytest.raises(IdempotencyConflict):
        jobs.submit(new(idempotency_key="k", fingerprint="other"))
    assert jobs.submit(new(idempotency_key="k", owner="you"))[1]


def test_one_key_from_many_at_once_is_one_job(opened: Open) -> None:
    jobs = Jobs(opened())
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(jobs.submit(new(idempotency_key="k"))[0]["id"])) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_jobs_are_seen_by_their_owner_alone(opened: Open) -> None:
    jobs = Jobs(opened())
    mine, _ = jobs.submit(new())
    assert ids(jobs.page("you", 10)[0]) == []
    for act in (jobs.get, jobs.cancel, jobs.delete):
        with pytest.raises(NotFound):
            act(mine["id"], "you")
    assert jobs.get(mine["id"], None)["id"] == mine["id"]


def test_a_list_is_read_in_pages(opened: Open) -> None:
    jobs = Jobs(opened())
    made = [jobs.submit(new())[0]["id"] for _ in range(5)][::-1]
    page, more = jobs.page("me", 2)
    assert (ids(page), more) == (made[:2], True)
    page, more = jobs.page("me", 3, after=made[1])
    assert (ids(page), more) == (made[2:], False)
    jobs.cancel(made[2], "me")
    assert ids(jobs.page("me", 9, status="cancelled")[0]) == [made[2]]


def test_turns_go_by_arrival_and_a_batch_stands_back_for_a_while(opened: Open) -> None:
    clock = Clock()
    jobs = Jobs(opened(clock=clock))
    late = jobs.submit(new(priority="batch"))[0]
    clock.now += 10
    early = jobs.submit(new())[0]
    clock.now += 600
    newest = jobs.submit(new())[0]
    order = [early["id"], late["id"], newest["id"]]
    rows, _ = jobs.page("me", 10)
    assert jobs.positions(rows) == {job: place for place, job in enumerate(order)}
    claimed, _, _ = jobs.leases.claim(3)
    assert ids(c.row for c in claimed) == order


def test_only_so_many_wait(opened: Open) -> None:
    jobs = Jobs(opened(), most=2)
    first = jobs.submit(new())[0]
    jobs.submit(new())
    with pytest.raises(QueueFull):
        jobs.submit(new())
    jobs.cancel(first["id"], "me")
    assert jobs.submit(new())[1]


def test_a_life(opened: Open) -> None:
    store = opened()
    jobs = Jobs(store)
    job = jobs.submit(new(uploads={"image": b"12"}))[0]["id"]
    [claimed], struck, recovered = jobs.leases.claim(5)
    assert (claimed.row["id"], claimed.suspect, struck, recovered) == (job, False, [], 0)
    assert jobs.leases.renew({job: (3, 25)}) == set()
    row = jobs.get(job, "me")
    assert (row["status"], row["step"], row["total_steps"]) == ("in_progress", 3, 25)
    assert jobs.leases.complete(job, {"seeds": [7, 8]}, [b"one", b"three"])
    assert not jobs.leases.complete(job, {}, [b"again"]), "done once"
    row = jobs.get(job, "me")
    assert (row["status"], row["result"], row["size"], row["step"]) == ("completed", {"seeds": [7, 8]}, 10, 25)
    assert b"".join(store.read(job, "picture-1")) == b"three"
    assert jobs.counts() == {"queued": 0, "in_progress": 0, "completed": 1, "failed": 0, "cancelled": 0}
    with pytest.raises(Conflict):
        jobs.cancel(job, "me")
    jobs.delete(job, "me")
    with pytest.raises(NotFound):
        jobs.get(job, "me")
    assert list(store.blobs.owners()) == []
    assert store.rows(sa.select(BLOBS)) == []


def test_a_running_job_is_asked_to_stop(opened: Open) -> None:
    jobs = Jobs(opened())
    job, other = (jobs.submit(new())[0]["id"] for _ in range(2))
    jobs.leases.claim(2)
    with pytest.raises(Conflict):
        jobs.delete(job, "me")
    assert jobs.cancel(job, "me")["status"] == "in_progress"
    assert jobs.leases.renew({job: (0, 1), other: (0, 1)}) == {job}
    jobs.leases.stopped(job)
    assert jobs.get(job, "me")["status"] == "cancelled"
    assert jobs.cancel(job, "me")["status"] == "cancelled", "twice is as once"
    assert jobs.leases.fail(other, Internal("it broke"))
    error = jobs.get(other, "me")["error"]
    assert (error["status"], error["code"], error["message"]) == (500, "internal_error", "it broke")


def test_what_ran_when_the_process_ended_runs_again_alone_and_three_times_at_most(opened: Open) -> None:
    clock = Clock()
    store = opened(clock=clock)
    jobs = Jobs(store)
    made = [jobs.submit(new())[0]["id"] for _ in range(3)]
    assert len(jobs.leases.claim(2)[0]) == 2
    for attempt in (2, 3):
        clock.now += 31
        jobs = after_the_end(opened, clock)
        assert jobs.leases.claim(5, alone=False)[0] == [], "it waits until nothing else runs"
        [claimed], struck, _ = jobs.leases.claim(5)
        assert (claimed.row["id"], claimed.suspect, claimed.row["attempts"]) == (made[0], True, attempt)
        assert struck == []
    clock.now += 31
    jobs = after_the_end(opened, clock)
    [claimed], [struck_job], _ = jobs.leases.claim(5)
    assert struck_job["id"] == made[0]
    assert jobs.get(made[0], "me")["error"]["code"] == "job_crashed"
    assert claimed.row["id"] == made[1]
    jobs.leases.release([made[1]])
    row = jobs.get(made[1], "me")
    assert (row["status"], row["attempts"]) == ("queued", 1), "what is given back has no strike more"


def after_the_end(opened: Open, clock: Clock) -> Jobs:
    store = opened(clock=clock)
    if not store.shared:
        Jobs(store).leases.recover()
    return Jobs(store)


def test_servers_share_the_queue_and_no_job(server: Callable[[], str], request: pytest.FixtureRequest) -> None:
    clock = Clock()
    stores = [Store(url=server(), clock=clock) for _ in range(2)]
    here, there = (Jobs(store) for store in stores)
    for _ in range(40):
        here.submit(new())
    taken = [ids(c.row for c in jobs.leases.claim(3)[0]) for jobs in (here, there)]

    def take(jobs: Jobs, into: list[str]) -> None:
        while claimed := jobs.leases.claim(3)[0]:
            into += ids(c.row for c in claimed)

    threads = [threading.Thread(target=take, args=pair) for pair in ((here, taken[0]), (there, taken[1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken[0] + taken[1]) == 40 == len({*taken[0], *taken[1]})
    clock.now += 20
    there.leases.renew(dict.fromkeys(taken[1], (0, 0)))
    clock.now += 20  # the leases of the first have run out
    job = taken[0][0]
    [claimed], _, recovered = there.leases.claim(40)
    assert (claimed.row["id"], recovered) == (job, 1)
    assert here.leases.renew({job: (0, 0)}) == {job}, "it is told that the job is not its own any more"
    assert not here.leases.complete(job, {}, [b"late"])
    assert there.leases.complete(job, {}, [b"right"])
    assert b"".join(here.store.read(job, "picture-0")) == b"right"
    for store in stores:
        store.close()


def test_what_is_over_is_forgotten_by_age_count_and_bytes(opened: Open) -> None:
    clock = Clock()
    store = opened(clock=clock)
    jobs = Jobs(store)
    made = []
    for _ in range(6):
        made.append(jobs.submit(new())[0]["id"])
        jobs.leases.claim(1)
        jobs.leases.complete(made[-1], {}, [b"x" * 100])
        clock.now += 10
    waiting = jobs.submit(new(uploads={"image": b"y" * 1000}))[0]["id"]

    def kept() -> list[str]:
        return ids(jobs.page("me", 50)[0])[::-1]

    Retention(seconds=55, count=100, max_bytes=10**6).apply(store)
    assert kept() == [*made[1:], waiting]
    Retention(seconds=1000, count=3, max_bytes=10**6).apply(store)
    assert kept() == [*made[3:], waiting]
    Retention(seconds=1000, count=3, max_bytes=1000).apply(store)
    assert kept() == [waiting], "what waits stays, whatever it takes"
    assert store.used == 1000


def test_a_full_store_takes_nothing_new(opened: Open) -> None:
    store = opened(max_bytes=1000)
    jobs = Jobs(store)
    jobs.submit(new(uploads={"image": b"x" * 900}))
    with pytest.raises(StoreFull):
        jobs.submit(new(uploads={"image": b"x" * 200}))
    assert len(jobs.page("me", 10)[0]) == 1


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    jobs = Jobs(store)
    job = jobs.submit(new())[0]["id"]
    jobs.leases.claim(1)
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "RESERVE", 2**62)
        with pytest.raises(StoreFull):
            jobs.submit(new(uploads={"image": b"x"}))
    store.close()
    store = Store(tmp_path)
    limit_pages(store)
    jobs = Jobs(store)
    with pytest.raises(StoreFull):
        jobs.submit(new(body={"prompt": "x" * 2**20}, uploads={"image": b"x"}))
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and not p.name.startswith("jobs")] == [
        tmp_path / "blobs",
        *(tmp_path / "blobs").iterdir(),  # empty folders
    ]
    jobs.leases.recover()
    assert jobs.get(job, "me")["status"] == "queued", "what was accepted goes on"
    store.close()


def limit_pages(store: Store) -> None:
    """SQLite's own way to end in "database or disk is full"."""

    def limit(connection: Any, _: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")

    store.engine.dispose()
    sa.event.listen(store.engine, "connect", limit)


def test_a_disk_that_is_full_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    jobs = Jobs(store)
    job = jobs.submit(new())[0]["id"]
    jobs.leases.claim(1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StoreFull):
            jobs.leases.complete(job, {}, [b"picture"])
    assert not [p for p in (tmp_path / "blobs").rglob("*") if p.is_file()]
    assert jobs.leases.complete(job, {}, [b"picture"]), "and it is done when there is room"
    store.close()


def test_bytes_without_a_row_are_swept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    job = Jobs(store).submit(new(uploads={"image": b"x"}))[0]["id"]
    with store.begin() as connection:
        store.put(connection, "job-lost", "image", [b"x"])
    assert store.sweep() == 1
    assert list(store.blobs.owners()) == [job]
    store.close()


def test_a_directory_has_one_server(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="in use by another server"):
        Store(tmp_path)
    look = Store(tmp_path, exclusive=False)
    assert Jobs(look).counts()["queued"] == 0
    look.close()
    store.close()
    Store(tmp_path).close()


def test_a_damaged_store_is_not_reset(tmp_path: Path) -> None:
    Store(tmp_path).close()
    file = tmp_path / database.FILE
    for damage in (b"this is no database " * 400, file.read_bytes()[:4096] + b"\xff" * 60_000):
        file.write_bytes(damage)
        with pytest.raises(StoreError, match=r"nothing was changed|damaged"):
            Store(tmp_path)
        assert file.read_bytes() == damage


def test_a_store_of_a_newer_version_is_refused(opened: Open) -> None:
    with opened().begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError, match=r"9999.*newer"):
        opened()


def test_a_locked_store_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    store = Store(tmp_path)
    other = Store(tmp_path, exclusive=False)
    with other.begin():
        with pytest.raises(StoreUnavailable):
            Jobs(store).counts()
        with pytest.raises(StoreError, match="locked"):
            Store(tmp_path, exclusive=False)
    assert Jobs(store).counts()["queued"] == 0
    other.close()
    store.close()


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(url=f"postgresql+psycopg://me:secret@/jobs?host={tmp_path}")
    with pytest.raises(StoreError, match=r"postgresql\+psycopg"):
        Store(url="sqlite:///x")
    with pytest.raises(StoreError) as caught:
        Store(url=f"postgresql+psycopg://me:secret@/jobs?host={tmp_path}")
    assert "secret" not in str(caught.value)


def test_jobs_table_is_read_by_index(tmp_path: Path) -> None:
    store = Store(tmp_path)
    query = sa.select(JOBS.c.id).where(JOBS.c.status == "queued").order_by(JOBS.c.turn, JOBS.c.seq).limit(8)
    with store.begin() as connection:
        text = str(query.compile(store.engine, compile_kwargs={"literal_binds": True}))
        plan = " ".join(row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}"))
    assert "ix_jobs_turn" in plan
    assert "TEMP B-TREE" not in plan
    store.close()
