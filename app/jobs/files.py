"""The files of the store: what batches read, and what they wrote."""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa

from app.errors import NotFound, QueueFull
from app.jobs.store import Row, Store, new_id
from app.jobs.tables import FILES

CONTENT = "content"
MOST = 10_000
"""Files of one owner."""


class Files:
    """What can be done with the files of a store. Any thread may call."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def add(
        self,
        owner: str,
        filename: str,
        chunks: Iterable[bytes],
        size: int,
        keep: float | None = None,
        purpose: str = "batch",
    ) -> Row:
        """Keep a file of a client's, for `keep` seconds. Raises `StoreFull`."""
        self.store.make_sure_of_room(size)
        with self.store.begin() as connection:
            count = sa.select(sa.func.count()).select_from(FILES).where(FILES.c.owner == owner)
            if connection.execute(count).scalar_one() >= MOST:
                raise QueueFull(f"{MOST} files are kept already; delete some", retry_after=60)
        file_id, now = new_id("file"), self.store.clock()

        def record(connection: sa.Connection, sizes: dict[str, int]) -> Row:
            values = described(file_id, owner, purpose, filename, sizes[file_id], now, keep)
            return connection.execute(sa.insert(FILES).values(values).returning(FILES)).mappings().one()

        return self.store.write({file_id: chunks}, CONTENT, record)

    def get(self, file_id: str, owner: str | None) -> Row:
        """One file of an owner's. Raises `NotFound`."""
        where = [FILES.c.id == file_id] + ([] if owner is None else [FILES.c.owner == owner])
        rows = self.store.rows(sa.select(FILES).where(*where))
        if not rows:
            raise NotFound(f"file_id: there is no file {file_id!r}", param="file_id")
        return rows[0]

    def page(
        self, owner: str, limit: int, after: str | None, order: str, purpose: str | None
    ) -> tuple[list[Row], bool]:
        """An owner's files by age, and whether there are more."""
        latest = order == "desc"
        query = sa.select(FILES).where(FILES.c.owner == owner).limit(limit + 1)
        query = query.order_by(FILES.c.seq.desc() if latest else FILES.c.seq)
        if purpose is not None:
            query = query.where(FILES.c.purpose == purpose)
        if after is not None:
            seq = self.get(after, owner)["seq"]
            query = query.where(FILES.c.seq < seq if latest else FILES.c.seq > seq)
        rows = self.store.rows(query)
        return rows[:limit], len(rows) > limit

    def delete(self, file_id: str, owner: str) -> None:
        """Forget a file. A batch that reads it fails."""
        self.get(file_id, owner)
        self.store.forget([file_id], sa.delete(FILES).where(FILES.c.id == file_id))


def described(
    file_id: str, owner: str, purpose: str, filename: str, size: int, now: float, keep: float | None
) -> dict[str, object]:
    """A row of the table."""
    named: dict[str, object] = {"id": file_id, "owner": owner, "purpose": purpose, "filename": filename}
    return named | {"size": size, "created_at": now, "expires_at": None if keep is None else now + keep}
