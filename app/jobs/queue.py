"""The jobs of the store as clients know them: accepted, looked at, cancelled, forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from app.errors import Conflict, IdempotencyConflict, NotFound, QueueFull
from app.jobs.ending import OVER, end
from app.jobs.leases import Leases
from app.jobs.store import Row, Store, new_id
from app.jobs.tables import JOBS, count_where

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = ("queued", "in_progress", "completed", "failed", "cancelled")
Priority = Literal["interactive", "batch"]
HEAD_START: Mapping[Priority, float] = {"interactive": 0.0, "batch": 600.0}
"""Seconds that a class stands back: after them a job goes before all that come later, so that none starves."""


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


class Jobs:
    """What clients can do with the jobs of a store, of which `most` may wait; `leases` is what servers do."""

    def __init__(self, store: Store, most: int = 100_000, lease: float = 30.0) -> None:
        self.store = store
        self.most = most
        self.leases = Leases(store, lease)

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

    # Giving up

    def cancel(self, job_id: str, owner: str | None) -> Row:
        """Cancel what waits at once, ask the server that runs it otherwise. Raises `Conflict` for what is over."""
        with self.store.begin() as connection:
            row = self._get(connection, job_id, owner)
            if row["status"] in OVER and row["status"] != "cancelled":
                raise Conflict(f"job_id: the job is {row['status']} already", param="job_id")
            end(
                connection, self.store.clock(), sa.and_(JOBS.c.id == job_id, JOBS.c.status == "queued"), "cancelled", {}
            )
            ask = sa.update(JOBS).where(JOBS.c.id == job_id, JOBS.c.status == "in_progress")
            connection.execute(ask.values(cancel=True))
            return self._get(connection, job_id, owner)

    def delete(self, job_id: str, owner: str | None) -> None:
        """Forget a job that is over, with its pictures. Raises `Conflict` for one that is not."""
        row = self.get(job_id, owner)
        if row["status"] not in OVER:
            raise Conflict(f"job_id: the job is {row['status']}; cancel it first", param="job_id")
        self.store.forget([job_id], sa.delete(JOBS).where(JOBS.c.id == job_id))


def behind(place: tuple[float, int]) -> sa.ColumnElement[bool]:
    """Jobs whose turn is after a place."""
    turn, seq = place
    return sa.or_(JOBS.c.turn > turn, sa.and_(JOBS.c.turn == turn, JOBS.c.seq > seq))


def behind_or_at(place: tuple[float, int]) -> sa.ColumnElement[bool]:
    """Jobs whose turn is a place, or after it."""
    turn, seq = place
    return sa.or_(JOBS.c.turn > turn, sa.and_(JOBS.c.turn == turn, JOBS.c.seq >= seq))
