"""What the store forgets, and when: by age, by count, by bytes. What waits or runs is never forgotten."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from app.jobs.ending import OVER
from app.jobs.store import PAGE, Store
from app.jobs.tables import BATCHES, FILES, JOBS, count_where


@dataclass(frozen=True)
class Retention:
    """How long, how many and how much is kept of what is over."""

    seconds: float
    count: int
    max_bytes: int

    def apply(self, store: Store) -> int:
        """Forget what is too old or too much, the oldest first: how many jobs and files."""
        old = store.clock() - self.seconds
        gone = self._jobs(store, PAGE, JOBS.c.completed_at < old)
        gone += self._files(store, FILES.c.expires_at < store.clock())
        with store.begin() as connection:
            connection.execute(sa.delete(BATCHES).where(BATCHES.c.ended_at < old))
            ended = sa.select(BATCHES.c.id).where(BATCHES.c.ended_at.is_not(None))
            over = connection.execute(count_where(*_forgettable())).scalar_one()
        gone += self._forget(store, PAGE, JOBS.c.batch_id.in_(ended))
        while over > self.count and (forgotten := self._jobs(store, min(PAGE, over - self.count))):
            over -= forgotten
            gone += forgotten
        while store.count_bytes() > self.max_bytes and (forgotten := self._jobs(store, 20)):
            gone += forgotten
        return gone

    def _jobs(self, store: Store, limit: int, *conditions: sa.ColumnElement[bool]) -> int:
        return self._forget(store, limit, *_forgettable(), *conditions)

    def _forget(self, store: Store, limit: int, *conditions: sa.ColumnElement[bool]) -> int:
        query = sa.select(JOBS.c.id).where(*conditions).order_by(JOBS.c.seq).limit(limit)
        ids = [row["id"] for row in store.rows(query)]
        if ids:
            store.forget(ids, sa.delete(JOBS).where(JOBS.c.id.in_(ids)))
        return len(ids)

    def _files(self, store: Store, *conditions: sa.ColumnElement[bool]) -> int:
        ids = [row["id"] for row in store.rows(sa.select(FILES.c.id).where(*conditions).limit(PAGE))]
        if ids:
            store.forget(ids, sa.delete(FILES).where(FILES.c.id.in_(ids)))
        return len(ids)


def _forgettable() -> tuple[sa.ColumnElement[bool], ...]:
    """Jobs that are over; those of a batch go into its file and are forgotten by it."""
    return JOBS.c.status.in_(OVER), JOBS.c.batch_id.is_(None)
