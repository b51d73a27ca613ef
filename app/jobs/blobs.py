"""Bytes of the store, by whose they are and a name: files beside SQLite, rows of PostgreSQL. Whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa

from app.jobs.database import sync_directory
from app.jobs.tables import BLOBS

CHUNK = 2**20


class Blobs(Protocol):
    """Where uploads, pictures and batch files lie. Owners and names are made by the server, never by a client."""

    def put(self, connection: sa.Connection | None, owner_id: str, name: str, chunks: Iterable[bytes]) -> int:
        """Write, where these are rows in the transaction of `connection`; how many bytes."""

    def chunks(self, engine: sa.Engine, owner_id: str, name: str, offset: int = 0) -> Iterator[bytes]:
        """Read from an offset, a chunk at a time. Raises `FileNotFoundError`."""

    def forget(self, connection: sa.Connection, owner_ids: Iterable[str]) -> None:
        """Forget all of some owners, as far as it is of the transaction; `clean` after it does the rest."""

    def clean(self, owner_ids: Iterable[str]) -> None:
        """Remove what rows no longer speak of."""

    def owners(self) -> Iterator[str]:
        """Whose bytes there are, where the database does not know by itself."""


class FileBlobs:
    """Files: written beside their place, on the disk before they are moved there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, owner_id: str) -> Path:
        """The owner's folder; spread over 256, by the end of what is random in the id."""
        return self.root / owner_id[-2:] / owner_id

    def put(self, connection: sa.Connection | None, owner_id: str, name: str, chunks: Iterable[bytes]) -> int:
        folder = self.folder(owner_id)
        folder.mkdir(parents=True, exist_ok=True)
        half, size = folder / f"{name}.half", 0
        try:
            with half.open("wb") as out:
                for chunk in chunks:
                    size += out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            half.rename(folder / name)
            for made in (folder, folder.parent, self.root):
                sync_directory(made)
        except BaseException:
            half.unlink(missing_ok=True)
            raise
        return size

    def chunks(self, engine: sa.Engine, owner_id: str, name: str, offset: int = 0) -> Iterator[bytes]:
        with (self.folder(owner_id) / name).open("rb") as file:
            file.seek(offset)
            while chunk := file.read(CHUNK):
                yield chunk

    def forget(self, connection: sa.Connection, owner_ids: Iterable[str]) -> None:
        pass

    def clean(self, owner_ids: Iterable[str]) -> None:
        for owner_id in owner_ids:
            shutil.rmtree(self.folder(owner_id), ignore_errors=True)

    def owners(self) -> Iterator[str]:
        for shard in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            yield from (folder.name for folder in shard.iterdir())


class RowBlobs:
    """Rows of at most a mebibyte each."""

    def put(self, connection: sa.Connection | None, owner_id: str, name: str, chunks: Iterable[bytes]) -> int:
        if connection is None:
            raise ValueError("rows are written in a transaction")
        size = 0
        connection.execute(sa.delete(BLOBS).where(BLOBS.c.owner_id == owner_id, BLOBS.c.name == name))
        for part, chunk in enumerate(_even(chunks)):
            connection.execute(sa.insert(BLOBS).values(owner_id=owner_id, name=name, part=part, data=chunk))
            size += len(chunk)
        return size

    def chunks(self, engine: sa.Engine, owner_id: str, name: str, offset: int = 0) -> Iterator[bytes]:
        part, skip = divmod(offset, CHUNK)
        found = False
        while True:
            with engine.begin() as connection:
                where = (BLOBS.c.owner_id == owner_id, BLOBS.c.name == name, BLOBS.c.part == part)
                data = connection.execute(sa.select(BLOBS.c.data).where(*where)).scalar()
            if data is None:
                if not found and not self._has(engine, owner_id, name):
                    raise FileNotFoundError(name)
                return
            found = True
            yield bytes(data)[skip:]
            part, skip = part + 1, 0

    @staticmethod
    def _has(engine: sa.Engine, owner_id: str, name: str) -> bool:
        where = (BLOBS.c.owner_id == owner_id, BLOBS.c.name == name)
        with engine.begin() as connection:
            return connection.execute(sa.select(BLOBS.c.part).where(*where).limit(1)).first() is not None

    def clean(self, owner_ids: Iterable[str]) -> None:
        pass

    def forget(self, connection: sa.Connection, owner_ids: Iterable[str]) -> None:
        connection.execute(sa.delete(BLOBS).where(BLOBS.c.owner_id.in_(list(owner_ids))))

    def owners(self) -> Iterator[str]:
        return iter(())


def _even(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in chunks of `CHUNK`, the last may be shorter; one at least."""
    buffer, sent = bytearray(), False
    for chunk in chunks:
        buffer += chunk
        while len(buffer) >= CHUNK:
            yield bytes(buffer[:CHUNK])
            sent = True
            del buffer[:CHUNK]
    if buffer or not sent:
        yield bytes(buffer)
