"""What a server does with the jobs that it runs: claimed under a lease, renewed, finished, given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from app.errors import JobCrashed, ServiceError
from app.jobs.ending import described, end
from app.jobs.store import Row, Store
from app.jobs.tables import JOBS, count_where

STRIKES = 3
"""How often a job may have been running when the process ended."""


@dataclass(frozen=True)
class Claimed:
    """A job that this server runs now. A `suspect` was running when a process ended, and should run alone."""

    row: Row
    suspect: bool


class Leases:
    """The jobs of a store that this server has to itself; a claim holds for `lease` seconds. Any thread may call."""

    def __init__(self, store: Store, lease: float = 30.0) -> None:
        self.store = store
        self.lease = lease

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
                    struck += end(
                        connection, self.store.clock(), JOBS.c.id == row["id"], "failed", {"error": described(error)}
                    )
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
            return bool(
                end(connection, self.store.clock(), sa.and_(JOBS.c.id == job_id, self._mine()), "completed", values)
            )

    def fail(self, job_id: str, error: ServiceError) -> bool:
        """A job that ends without pictures. False where it is no longer this server's."""
        with self.store.begin() as connection:
            mine = sa.and_(JOBS.c.id == job_id, self._mine())
            return bool(end(connection, self.store.clock(), mine, "failed", {"error": described(error)}))

    def stopped(self, job_id: str) -> None:
        """A running job that was asked to stop has."""
        with self.store.begin() as connection:
            end(connection, self.store.clock(), sa.and_(JOBS.c.id == job_id, self._mine()), "cancelled", {})

    def _mine(self) -> sa.ColumnElement[bool]:
        return sa.and_(JOBS.c.status == "in_progress", JOBS.c.lease_owner == self.store.server)
