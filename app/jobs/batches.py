"""The batches of the store: their rows, their leases, and the lines that have become jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from app.errors import Conflict, NotFound, QueueFull
from app.jobs.ending import OVER
from app.jobs.files import CONTENT
from app.jobs.lines import error, fault, lines
from app.jobs.queue import Jobs, NewJob
from app.jobs.store import Row, Store, new_id
from app.jobs.tables import BATCHES, FILES, JOBS, count_where

ACTIVE = ("validating", "in_progress", "cancelling", "finalizing")
MOST = 1000
"""Batches that are not over."""
WINDOW = 256
"""Lines of one batch that are jobs at a time and not over: the rest of its file stays a file."""
MOST_ERRORS = 100
LEASE_SECONDS = 60.0


class Batches:
    """What can be done with the batches of a store. Any thread may call."""

    def __init__(self, store: Store, jobs: Jobs, keep_seconds: float) -> None:
        self.store = store
        self.jobs = jobs
        self.keep_seconds = keep_seconds

    # From the routes

    def create(self, owner: str, endpoint: str, file_id: str, window: str, attributes: Any) -> Row:
        """A batch over a file of the owner's. Raises `NotFound`, `QueueFull`."""
        now = self.store.clock()
        with self.store.begin() as connection:
            where = (FILES.c.id == file_id, FILES.c.owner == owner, FILES.c.purpose == "batch")
            if connection.execute(sa.select(FILES.c.id).where(*where)).scalar() is None:
                raise NotFound(f"input_file_id: there is no file {file_id!r} for batches", param="input_file_id")
            active = sa.select(sa.func.count()).select_from(BATCHES).where(BATCHES.c.status.in_(ACTIVE))
            if connection.execute(active).scalar_one() >= MOST:
                raise QueueFull(f"{MOST} batches are under way already", retry_after=60)
            insert = sa.insert(BATCHES).values(
                id=new_id("batch"),
                owner=owner,
                endpoint=endpoint,
                input_file_id=file_id,
                completion_window=window,
                status="validating",
                attributes=attributes,
                created_at=now,
                expires_at=now + 3600 * int(window.removesuffix("h")),
            )
            return connection.execute(insert.returning(BATCHES)).mappings().one()

    def get(self, batch_id: str, owner: str | None) -> Row:
        """One batch of an owner's. Raises `NotFound`."""
        where = [BATCHES.c.id == batch_id] + ([] if owner is None else [BATCHES.c.owner == owner])
        rows = self.store.rows(sa.select(BATCHES).where(*where))
        if not rows:
            raise NotFound(f"batch_id: there is no batch {batch_id!r}", param="batch_id")
        return rows[0]

    def page(self, owner: str, limit: int, after: str | None) -> tuple[list[Row], bool]:
        """An owner's batches, the latest first, and whether there are more."""
        query = sa.select(BATCHES).where(BATCHES.c.owner == owner).order_by(BATCHES.c.seq.desc()).limit(limit + 1)
        if after is not None:
            query = query.where(BATCHES.c.seq < self.get(after, owner)["seq"])
        rows = self.store.rows(query)
        return rows[:limit], len(rows) > limit

    def cancel(self, batch_id: str, owner: str) -> Row:
        """Start no more of a batch's lines. Raises `Conflict` for one that is over."""
        row = self.get(batch_id, owner)
        if row["status"] not in (*ACTIVE, "cancelled") or row["status"] == "finalizing":
            raise Conflict(f"batch_id: the batch is {row['status']} already", param="batch_id")
        with self.store.begin() as connection:
            going = BATCHES.c.status.in_(("validating", "in_progress"))
            ask = sa.update(BATCHES).where(BATCHES.c.id == batch_id, going)
            connection.execute(ask.values(status="cancelling", cancelling_at=self.store.clock()))
        return self.get(batch_id, owner)

    def counts(self, row: Row) -> dict[str, int]:
        """Lines in all, completed and failed."""
        if row["ended_at"] is not None:
            return {name: row[name] for name in ("total", "completed", "failed")}
        query = sa.select(JOBS.c.status, sa.func.count().label("n")).where(JOBS.c.batch_id == row["id"])
        found = {r["status"]: r["n"] for r in self.store.rows(query.group_by(JOBS.c.status))}
        return {"total": row["total"], "completed": found.get("completed", 0), "failed": found.get("failed", 0)}

    # From who drives them

    def active(self) -> list[Row]:
        """Batches that are not over and that this server may drive: it has their lease from now on."""
        now = self.store.clock()
        free = sa.or_(
            BATCHES.c.lease_owner.is_(None), BATCHES.c.lease_owner == self.store.server, BATCHES.c.lease_until < now
        )
        with self.store.begin() as connection:
            update = sa.update(BATCHES).where(BATCHES.c.status.in_(ACTIVE), free)
            lease = {"lease_owner": self.store.server, "lease_until": now + LEASE_SECONDS}
            return list(connection.execute(update.values(lease).returning(BATCHES)).mappings())

    def keep(self, row: Row) -> None:
        """Renew the lease of a batch that this server works at."""
        self._update(row, {"lease_until": self.store.clock() + LEASE_SECONDS}, *ACTIVE)

    def let_go(self, *, whosever: bool = False) -> None:
        """Give up this server's leases; whosever they are where it holds the store alone."""
        with self.store.begin() as connection:
            mine = sa.true() if whosever else BATCHES.c.lease_owner == self.store.server
            connection.execute(sa.update(BATCHES).where(mine).values(lease_owner=None))

    def validate(self, row: Row, most_lines: int, most_bytes: int) -> None:
        """Read a batch's file once, as a stream: it goes on, or fails with what is wrong with which line."""
        total, errors, seen = 0, list[dict[str, Any]](), set[str]()
        try:
            for total, (_, line) in enumerate(lines(self.store.read(row["input_file_id"], CONTENT), most_bytes), 1):
                if total > most_lines:
                    errors = [error(None, "too_many_lines", f"more than {most_lines} lines")]
                    break
                wrong = fault(line, row["endpoint"], seen)
                if wrong is not None and len(errors) < MOST_ERRORS:
                    errors.append(error(total, "invalid_line", wrong))
        except ValueError:
            errors.append(error(total + 1, "line_too_long", f"a line is longer than {most_bytes} bytes"))
        if not total and not errors:
            errors = [error(None, "empty_file", "the file has no lines")]
        now = self.store.clock()
        values: dict[str, Any] = {"status": "in_progress", "in_progress_at": now, "total": total}
        if errors:
            values = {"status": "failed", "ended_at": now, "errors": errors, "total": total}
        self._update(row, values, "validating")

    def _update(self, row: Row, values: Mapping[str, Any], *statuses: str) -> None:
        with self.store.begin() as connection:
            where = (BATCHES.c.id == row["id"], BATCHES.c.status.in_(statuses))
            connection.execute(sa.update(BATCHES).where(*where).values(values))

    def unfinished(self, row: Row) -> int:
        """Lines of a batch that are jobs and not over."""
        with self.store.begin() as connection:
            mine = (JOBS.c.batch_id == row["id"], JOBS.c.status.not_in(OVER))
            return int(connection.execute(count_where(*mine)).scalar_one())

    def next_lines(self, row: Row, count: int, most_bytes: int) -> list[tuple[int, bytes]]:
        """The next lines of a batch that are no jobs yet, each with the offset behind it."""
        chunks = self.store.read(row["input_file_id"], CONTENT, row["offset"])
        found = []
        for offset, line in lines(chunks, most_bytes):
            found.append((row["offset"] + offset, line))
            if len(found) == count:
                break
        return found

    def feed(self, row: Row, jobs: Sequence[NewJob], offset: int) -> None:
        """Make the next lines of a batch jobs, all or none; nothing where somebody else has."""
        with self.store.begin() as connection:
            where = (BATCHES.c.id == row["id"], BATCHES.c.line == row["line"], BATCHES.c.status == "in_progress")
            update = sa.update(BATCHES).where(*where).values(line=row["line"] + len(jobs), offset=offset)
            if connection.execute(update).rowcount:
                self.jobs.insert_all(connection, jobs)

    def cut(self, row: Row) -> bool:
        """Whether a line of a batch was cancelled."""
        with self.store.begin() as connection:
            mine = (JOBS.c.batch_id == row["id"], JOBS.c.status == "cancelled")
            return bool(connection.execute(count_where(*mine)).scalar_one())

    def stop(self, row: Row) -> None:
        """Cancel what a batch has waiting, ask for the end of what it has running."""
        with self.store.begin() as connection:
            mine = JOBS.c.batch_id == row["id"]
            over = {"status": "cancelled", "completed_at": self.store.clock()}
            connection.execute(sa.update(JOBS).where(mine, JOBS.c.status == "queued").values(over))
            connection.execute(sa.update(JOBS).where(mine, JOBS.c.status == "in_progress").values(cancel=True))
