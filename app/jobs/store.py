"""The store: the one way to the database and to the bytes beside it, from any thread or from the loop."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import sqlalchemy as sa

from app.errors import FileGone, StoreFull
from app.jobs.blobs import Blobs, FileBlobs, RowBlobs
from app.jobs.database import PICTURES, THREADS, connect, hold, in_our_words, migrate
from app.jobs.tables import FILES, JOBS

T = TypeVar("T")
Row = sa.RowMapping
RESERVE = 32 * 2**20
"""Bytes of the disk that are left for what has been accepted."""
PAGE = 500
"""Rows that one transaction looks at, where there may be many."""


class Store:
    """SQLite in a directory that one process holds, or PostgreSQL that several share."""

    def __init__(
        self,
        data_dir: Path | None = None,
        url: str | None = None,
        *,
        exclusive: bool = True,
        max_bytes: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open it and bring it to this version. Without `exclusive` a running server may hold the directory.

        `max_bytes`: of uploads, pictures and files; where there are more nothing new is accepted.

        Raises `StoreError` where it cannot be opened; it is then as it was.
        """
        self.shared = url is not None
        self.clock = clock
        self.max_bytes = max_bytes
        self.used = 0
        self.server = new_id("server")
        self._directory = None if self.shared else data_dir
        self._lock: IO[bytes] | None = None
        if url is None and data_dir is not None and exclusive:
            self._lock = hold(data_dir)
        try:
            self.engine = connect(data_dir, url)
            try:
                migrate(self.engine)
            except BaseException:
                self.engine.dispose()
                raise
        except BaseException:
            if self._lock is not None:
                self._lock.close()
            raise
        self.blobs: Blobs = RowBlobs() if url is not None or data_dir is None else FileBlobs(data_dir / PICTURES)
        self._threads = ThreadPoolExecutor(THREADS if self.shared else 1, "store")

    async def call(self, work: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Do something with the store off the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *arguments, **named))

    def close(self) -> None:
        """Finish what is under way and let the store go."""
        self._threads.shutdown(wait=True)
        self.engine.dispose()
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction: all of it is on the disk afterwards, or nothing. Raises a `Store...` of `app.errors`."""
        with in_our_words(), self.engine.begin() as connection:
            yield connection

    def make_sure_of_room(self, size: int) -> None:
        """Raise `StoreFull` where so many bytes more are too many, or the disk is so full that what runs needs it."""
        if self.max_bytes is not None and self.used + size > self.max_bytes:
            raise StoreFull(f"the store keeps {self.max_bytes} bytes and is full; delete jobs or wait", retry_after=60)
        if self._directory is not None and shutil.disk_usage(self._directory).free - size < RESERVE:
            raise StoreFull("the store's disk is full; delete jobs or wait", retry_after=60)

    def put(self, connection: sa.Connection, owner_id: str, name: str, chunks: Iterable[bytes]) -> int:
        """Write bytes in a transaction; how many."""
        size = self.blobs.put(connection, owner_id, name, chunks)
        self.used += size  # until retention counts again
        return size

    def write(
        self,
        files: Mapping[str, Iterable[bytes]],
        name: str,
        record: Callable[[sa.Connection, dict[str, int]], T],
    ) -> T:
        """Write streams, each under its owner's id, and what `record` says of their sizes: all or nothing.

        Files of a directory are written ahead of the transaction, which nobody else waits for meanwhile.
        """

        def put(connection: sa.Connection | None) -> dict[str, int]:
            return {owner_id: self.blobs.put(connection, owner_id, name, chunks) for owner_id, chunks in files.items()}

        try:
            with in_our_words():
                sizes = {} if self.shared else put(None)
            with self.begin() as connection:
                sizes = put(connection) if self.shared else sizes
                recorded = record(connection, sizes)
        except BaseException:
            self.blobs.clean(files)
            raise
        self.used += sum(sizes.values())
        return recorded

    def count_bytes(self) -> int:
        """Bytes of uploads, pictures and files that are kept."""
        with self.begin() as connection:
            sums = [connection.execute(sa.select(sa.func.sum(table.c.size))).scalar() for table in (JOBS, FILES)]
        self.used = sum(int(size or 0) for size in sums)
        return self.used

    def rows(self, query: sa.Select[Any]) -> list[Row]:
        """What a query finds."""
        with self.begin() as connection:
            return list(connection.execute(query).mappings())

    def read(self, owner_id: str, name: str, offset: int = 0) -> Iterator[bytes]:
        """Bytes of the store, a chunk at a time."""
        with in_our_words():
            try:
                yield from self.blobs.chunks(self.engine, owner_id, name, offset)
            except FileNotFoundError as error:
                raise FileGone("the store has lost a file") from error

    async def stream(self, owner_id: str, name: str) -> Any:
        """The same on the loop."""
        chunks = self.read(owner_id, name)
        while (chunk := await self.call(next, chunks, None)) is not None:
            yield chunk

    def forget(self, owner_ids: Iterable[str], *deletes: sa.Delete) -> None:
        """Delete rows, and then the bytes that were theirs."""
        ids = list(owner_ids)
        with self.begin() as connection:
            for delete in deletes:
                connection.execute(delete)
            self.blobs.forget(connection, ids)
        self.blobs.clean(ids)

    def sweep(self) -> int:
        """Remove bytes whose rows were never written, or are gone: how many owners'. Nothing else may be writing."""
        swept, page = 0, list[str]()
        for owner_id in self.blobs.owners():
            page.append(owner_id)
            if len(page) == PAGE:
                swept += self._sweep(page)
                page = []
        return swept + self._sweep(page)

    def _sweep(self, page: list[str]) -> int:
        known = [
            row["id"] for table in (JOBS, FILES) for row in self.rows(sa.select(table.c.id).where(table.c.id.in_(page)))
        ]
        orphans = set(page) - set(known)
        self.blobs.clean(orphans)
        return len(orphans)


def new_id(kind: str) -> str:
    """An id that nobody guesses."""
    return f"{kind}-{secrets.token_hex(16)}"
