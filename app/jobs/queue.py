"""The jobs of the store: accepted, claimed under a lease, finished, given back. Any thread may call."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from app.errors import Conflict, IdempotencyConflict, JobCrashed, NotFound, QueueFull, ServiceError
from app.jobs.store import Row, Store, new_id
from app.jobs.tables import DELIVERIES, JOBS

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = ("queued", "in_progress", "completed", "failed", "cancelled")
OVER = ("completed", "failed", "cancelled")
Priority = Literal["interactive", "batch"]
HEAD_START: Mapping[Priority, float] = {"interactive": 0.0, "batch": 600.0}
"""Seconds that a class stands back: after them a job goes before all that come later, so that none starves."""
STRIKES = 3
"""How often a job may have been running when the process ended."""


@dataclass(frozen=True)
class NewJob:
    """What is to be accepted. `body` is resolved and has no picture; `uploads` are the pictures by name."""

    owner: str
    body: Mapping[str, Any]
    digests: Mapping[str, str]
    fingerprint: str
    priority: Priority = "interactive"
    uploads: Mapping[str, bytes] | None = None
    idempotency_key: str | None = None
    webhook_url: str | None = None
    batch_id: str | None = None
    line: int | None = None
    custom_id: str | None = None
    error: Mapping[str, Any] | None = None  # of a batch's line that is not possible: it is over at once


@dataclass(frozen=True)
class Claimed:
    """A job that this server runs now. A `suspect` was running when a process ended, and should run alone."""

    row: Row
    suspect: bool


class Jobs:
    """What can be done with the jobs of a store. `most` may wait; `lease` is how many seconds a claim holds."""

    def __init__(self, store: Store, most: int = 100_000, lease: float = 30.0) -> None:
        self.store = store
        self.most = most
        self.lease = lease

    # Accepting

    def submit(self, new: NewJob) -> tuple[Row, bool]:
        """Accept a job: it is on the disk when this returns. The job, and whether it is new (`idempotency_key`).

        Raises `IdempotencyConflict`, `QueueFull`, or what the store says.
        """
        try:
            with self.store.begin() as connection:
                found = self._same(connection, new)
                if found is not None:
                    return found, False
                waiting = connection.execute(count_where(JOBS.c.status == "queued")).scalar_one()
                if waiting >= self.most:
                    raise QueueFull(f"{waiting} jobs are waiting already", retry_after=60)
                return self.insert(connection, new), True
        except IntegrityError:  # another server was faster with the same key
            with self.store.begin() as connection:
                found = self._same(connection, new)
                if found is None:
                    raise
                return found, False

    def _same(self, connection: sa.Connection, new: NewJob) -> Row | None:
        if new.idempotency_key is None:
            return None
        where = (JOBS.c.owner == new.owner, JOBS.c.idempotency_key == new.idempotency_key)
        found = connection.execute(sa.select(JOBS).where(*where)).mappings().first()
        if found is not None and found["fingerprint"] != new.fingerprint:
            raise IdempotencyConflict("Idempotency-Key: was sent with another body", param="Idempotency-Key")
        return found

    def insert(self, connection: sa.Connection, new: NewJob) -> Row:
        """Put a job into the table, in a transaction of the caller's."""
        job_id, now = new_id("job"), self.store.clock()
        over = (
            {"status": "failed", "completed_at": now, "error": dict(new.error)} if new.error else {"status": "queued"}
        )
        uploads = new.uploads or {}
        self.store.make_sure_of_room(sum(map(len, uploads.values())))
        try:
            size = sum(self.store.put(connection, job_id, name, [data]) for name, data in uploads.items())
            insert = sa.insert(JOBS).values(
                id=job_id,
                owner=new.owner,
                priority=new.priority,
                turn=now + HEAD_START[new.priority],
                body=dict(new.body),
                digests=dict(new.digests),
                fingerprint=new.fingerprint,
                idempotency_key=new.idempotency_key,
                webhook_url=new.webhook_url,
                created_at=now,
                size=size,
                batch_id=new.batch_id,
                line=new.line,
                custom_id=new.custom_id,
                **over,
            )
            return connection.execute(insert.returning(JOBS)).mappings().one()
        except BaseException:
            self.store.blobs.clean([job_id])
            raise

    def insert_all(self, connection: sa.Connection, new: Iterable[NewJob]) -> None:
        """Put jobs into the table, all or none, in a transaction of the caller's."""
        inserted: list[str] = []
        try:
            for job in new:
                row = self.insert(connection, job)
                inserted.append(row["id"])
        except BaseException:
            self.store.blobs.clean(inserted)
            raise

    # Looking

    def get(self, job_id: str, owner: str | None) -> Row:
        """One job of an owner's; None: of anybody's. Raises `NotFound`."""
        with self.store.begin() as connection:
            return self._get(connection, job_id, owner)

    def _get(self, connection: sa.Connection, job_id: str, owner: str | None) -> Row:
        where = [JOBS.c.id == job_id] + ([] if owner is None else [JOBS.c.owner == owner])
        row = connection.execute(sa.select(JOBS).where(*where)).mappings().first()
        if row is None:
            raise NotFound(f"job_id: there is no job {job_id!r}", param="job_id")
        return row

    def page(
        self, owner: str | None, limit: int, after: str | None = None, status: str | None = None
    ) -> tuple[list[Row], bool]:
        """Jobs, the latest first, but for those of batches; and whether there are more. `after`: the last id seen."""
        query = sa.select(JOBS).order_by(JOBS.c.seq.desc()).limit(limit + 1)
        if owner is not None:
            query = query.where(JOBS.c.owner == owner, JOBS.c.batch_id.is_(None))
        if status is not None:
            query = query.where(JOBS.c.status == status)
        if after is not None:
            query = query.where(JOBS.c.seq < self.get(after, owner)["seq"])
        rows = self.store.rows(query)
        return rows[:limit], len(rows) > limit

    def positions(self, rows: Iterable[Row]) -> dict[str, int]:
        """How many jobs go before each of these that waits. By one look at the queue."""
        waiting = [row for row in rows if row["status"] == "queued"]
        found = {}
        with self.store.begin() as connection:
            before, last = 0, (-1.0, -1)
            for row in sorted(waiting, key=lambda row: (row["turn"], row["seq"])):
                mine = (row["turn"], row["seq"])
                before += connection.execute(
                    count_where(JOBS.c.status == "queued", behind(last), ~behind_or_at(mine))
                ).scalar_one()
                found[row["id"]] = before
                last, before = mine, before + 1
        return found

    def counts(self) -> dict[str, int]:
        """Jobs by status."""
        query = sa.select(JOBS.c.status, sa.func.count().label("count")).group_by(JOBS.c.status)
        return dict.fromkeys(STATUSES, 0) | {row["status"]: row["count"] for row in self.store.rows(query)}

    # Running

    def recover(self) -> int:
        """Put back what a process was running that is gone; how many. Only who holds the store alone may ask."""
        with self.store.begin() as connection:
            update = sa.update(JOBS).where(JOBS.c.status == "in_progress").values(status="queued", lease_owner=None)
            return connection.execute(update).rowcount

    def claim(self, limit: int, alone: bool = True) -> tuple[list[Claimed], list[Row], int]:
        """Take what is next, at most `limit`, under a lease: claimed, failed for its strikes, and how many recovered.

        A suspect is taken by itself, and only where nothing else of this server's runs (`alone`).
        """
        now = self.store.clock()
        lost = sa.and_(JOBS.c.status == "in_progress", JOBS.c.lease_until < now)
        claimed: list[Claimed] = []
        struck: list[Row] = []
        recovered = 0
        with self.store.begin() as connection:
            rows: list[Row] = []
            for condition in (JOBS.c.status == "queued", lost):  # each by its own index
                query = sa.select(JOBS).where(condition).order_by(JOBS.c.turn, JOBS.c.seq).limit(limit)
                rows += connection.execute(query.with_for_update(skip_locked=True)).mappings()
            for row in sorted(rows, key=lambda row: (row["turn"], row["seq"]))[:limit]:
                suspect = row["attempts"] > 0
                if row["attempts"] >= STRIKES:
                    error = JobCrashed(f"the server ended {STRIKES} times while it ran this job")
                    struck += self._end(connection, JOBS.c.id == row["id"], "failed", {"error": described(error)})
                    continue
                if suspect and (claimed or not alone):
                    break
                recovered += row["status"] == "in_progress"
                update = sa.update(JOBS).where(JOBS.c.id == row["id"])
                taken = connection.execute(
                    update.values(
                        status="in_progress",
                        attempts=row["attempts"] + 1,
                        started_at=now,
                        step=0,
                        lease_owner=self.store.server,
                        lease_until=now + self.lease,
                    ).returning(JOBS)
                )
                claimed.append(Claimed(taken.mappings().one(), suspect))
                if suspect:
                    break
        return claimed, struck, recovered

    def renew(self, progress: Mapping[str, tuple[int, int]]) -> set[str]:
        """Keep the leases of running jobs, note (step, total) of each; which to stop: cancelled, or not ours now."""
        going = set[str]()
        with self.store.begin() as connection:
            for job_id, (step, total) in sorted(progress.items()):
                update = (
                    sa.update(JOBS)
                    .where(JOBS.c.id == job_id, self._mine())
                    .values(step=step, total_steps=total, lease_until=self.store.clock() + self.lease)
                )
                cancel = connection.execute(update.returning(JOBS.c.cancel)).scalar()
                if cancel is False:
                    going.add(job_id)
        return set(progress) - going

    def release(self, job_ids: Sequence[str]) -> None:
        """Give jobs back that were not done, through no fault of theirs."""
        with self.store.begin() as connection:
            update = sa.update(JOBS).where(JOBS.c.id.in_(job_ids), self._mine())
            connection.execute(update.values(status="queued", attempts=JOBS.c.attempts - 1, lease_owner=None))

    def complete(self, job_id: str, result: Mapping[str, Any], pictures: Sequence[bytes]) -> bool:
        """A job's pictures and what is said of them. False where it is no longer this server's: nothing is written."""
        with self.store.begin() as connection:
            names = {f"picture-{index}": data for index, data in enumerate(pictures)}
            if not connection.execute(count_where(JOBS.c.id == job_id, self._mine())).scalar_one():
                return False
            size = sum(self.store.put(connection, job_id, name, [data]) for name, data in names.items())
            values = {"result": dict(result), "size": JOBS.c.size + size, "step": JOBS.c.total_steps}
            return bool(self._end(connection, sa.and_(JOBS.c.id == job_id, self._mine()), "completed", values))

    def fail(self, job_id: str, error: ServiceError) -> bool:
        """A job that ends without pictures. False where it is no longer this server's."""
        with self.store.begin() as connection:
            mine = sa.and_(JOBS.c.id == job_id, self._mine())
            return bool(self._end(connection, mine, "failed", {"error": described(error)}))

    def stopped(self, job_id: str) -> None:
        """A running job that was asked to stop has."""
        with self.store.begin() as connection:
            self._end(connection, sa.and_(JOBS.c.id == job_id, self._mine()), "cancelled", {})

    def _mine(self) -> sa.ColumnElement[bool]:
        return sa.and_(JOBS.c.status == "in_progress", JOBS.c.lease_owner == self.store.server)

    def _end(
        self, connection: sa.Connection, where: sa.ColumnElement[bool], status: Status, values: Mapping[str, Any]
    ) -> list[Row]:
        """End the jobs for which `where` holds, with the webhooks that they asked for."""
        now = self.store.clock()
        ended = {"status": status, "completed_at": now, "lease_owner": None, "lease_until": None, **values}
        update = sa.update(JOBS).where(where, JOBS.c.status.not_in(OVER)).values(ended).returning(JOBS)
        rows = list(connection.execute(update).mappings())
        for row in rows:
            if row["webhook_url"] is not None:
                delivery = {"id": new_id("msg"), "job_id": row["id"], "url": row["webhook_url"]}
                told = {"payload": told_of(row), "next_at": now, "attempts": 0}
                connection.execute(sa.insert(DELIVERIES).values(**delivery, **told))
        return rows

    # Giving up

    def cancel(self, job_id: str, owner: str | None) -> Row:
        """Cancel what waits at once, ask the server that runs it otherwise. Raises `Conflict` for what is over."""
        with self.store.begin() as connection:
            row = self._get(connection, job_id, owner)
            if row["status"] in OVER and row["status"] != "cancelled":
                raise Conflict(f"job_id: the job is {row['status']} already", param="job_id")
            self._end(connection, sa.and_(JOBS.c.id == job_id, JOBS.c.status == "queued"), "cancelled", {})
            ask = sa.update(JOBS).where(JOBS.c.id == job_id, JOBS.c.status == "in_progress")
            connection.execute(ask.values(cancel=True))
            return self._get(connection, job_id, owner)

    def delete(self, job_id: str, owner: str | None) -> None:
        """Forget a job that is over, with its pictures. Raises `Conflict` for one that is not."""
        row = self.get(job_id, owner)
        if row["status"] not in OVER:
            raise Conflict(f"job_id: the job is {row['status']}; cancel it first", param="job_id")
        self.store.forget([job_id], sa.delete(JOBS).where(JOBS.c.id == job_id))


def count_where(*conditions: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """How many jobs."""
    return sa.select(sa.func.count()).select_from(JOBS).where(*conditions)


def behind(place: tuple[float, int]) -> sa.ColumnElement[bool]:
    """Jobs whose turn is after a place."""
    turn, seq = place
    return sa.or_(JOBS.c.turn > turn, sa.and_(JOBS.c.turn == turn, JOBS.c.seq > seq))


def behind_or_at(place: tuple[float, int]) -> sa.ColumnElement[bool]:
    """Jobs whose turn is a place, or after it."""
    turn, seq = place
    return sa.or_(JOBS.c.turn > turn, sa.and_(JOBS.c.turn == turn, JOBS.c.seq >= seq))


def told_of(row: Row) -> str:
    """What a webhook says of a job that is over: enough to know which, and to fetch the rest."""
    error = row["error"] and {name: row["error"][name] for name in ("message", "type", "param", "code")}
    job = {"id": row["id"], "object": "image.job", "status": row["status"], "model": row["body"].get("model")}
    job |= {"seed": row["body"].get("seed"), "error": error}
    job |= {name: int(row[name]) for name in ("created_at", "completed_at")}
    moment = datetime.fromtimestamp(row["completed_at"], UTC).isoformat()
    return json.dumps({"type": f"image.job.{row['status']}", "timestamp": moment, "data": job})


def described(error: ServiceError) -> dict[str, Any]:
    """An error as it is kept, with the status that a live request would have been answered with."""
    detail = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return {"status": error.status, **detail}
