"""Opening the store: SQLite in a directory, or PostgreSQL; brought to this version; its errors in our words."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from app.errors import StoreFailed, StoreFull, StoreUnavailable
from models.errors import SlipstreamError

FILE, LOCK, PICTURES = "jobs.sqlite3", "lock", "blobs"
BUSY_SECONDS = 5
MIGRATION_LOCK = 0x5117
"""PostgreSQL's advisory lock that one of several starting servers holds while it migrates."""
THREADS = 4
"""Connections to PostgreSQL. SQLite has one writer anyway."""


class StoreError(SlipstreamError):
    """The store cannot be opened; nothing in it was changed."""


def connect(data_dir: Path | None, url: str | None) -> sa.Engine:
    """An engine for PostgreSQL where there is a URL, else for SQLite in `data_dir`, which must exist."""
    if url is not None:
        try:
            engine = sa.create_engine(url, pool_size=THREADS, max_overflow=0, pool_pre_ping=True, hide_parameters=True)
        except (SQLAlchemyError, ImportError) as error:
            raise StoreError(f"jobs_url: {error}; pip install 'slipstream-diffusion[postgres]'?") from error
        if engine.dialect.name != "postgresql":
            raise StoreError("jobs_url: must begin with postgresql+psycopg://")
        return engine
    if data_dir is None:
        raise StoreError("give --data-dir or --jobs-url")
    engine = sa.create_engine(
        f"sqlite:///{data_dir / FILE}", connect_args={"timeout": BUSY_SECONDS}, hide_parameters=True
    )
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _configure(connection: Any, _: object) -> None:
    """Write-ahead log, and every commit on the disk before it returns."""
    connection.isolation_level = None  # we begin ourselves
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def hold(data_dir: Path) -> IO[bytes]:
    """The lock of a data directory, which ends with the process however it ends.

    Raises `StoreError` where another process holds it.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (data_dir / LOCK).open("ab")
    except OSError as error:
        raise StoreError(f"data_dir: {data_dir} cannot be written: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise StoreError(
            f"data_dir: {data_dir} is in use by another server; give each its own, or share PostgreSQL by --jobs-url"
        ) from error
    return lock


def migrate(engine: sa.Engine) -> None:
    """Bring the store to this version. Raises `StoreError` for one that is damaged, locked, full or newer than this."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    try:
        with engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            elif (found := connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()) != "ok":
                raise StoreError(
                    f"the store is damaged, restore a copy or move it away: {engine.url.database}: {found}"
                )
            known = {step.revision for step in ScriptDirectory.from_config(config).walk_revisions()}
            if sa.inspect(connection).has_table("alembic_version"):
                version = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
                if version not in known:
                    raise StoreError(f"the store is of version {version}, which this server does not know: it is newer")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except (DBAPIError, CommandError, OSError) as error:
        reason = getattr(error, "orig", None) or error
        where = engine.url.render_as_string(hide_password=True)
        raise StoreError(f"the store cannot be opened, nothing was changed: {where}: {reason}") from error


@contextmanager
def in_our_words() -> Iterator[None]:
    """Errors of the database and of the disk as errors that a client can be answered with."""
    try:
        yield
    except IntegrityError:  # two at once: whoever asked knows what that means
        raise
    except DBAPIError as error:
        raise _named(error) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreFull("the store's disk is full; delete jobs or wait", retry_after=60) from error
        raise StoreFailed("the store could not be read or written") from error


FULL, BUSY = "sqlite 13", ("sqlite 5", "sqlite 6")
DISK_FULL, CONNECTION = "53100", ("08", "57P", "53300", "55P03", "40")


def _named(error: DBAPIError) -> StoreFull | StoreUnavailable | StoreFailed:
    """SQLite's result codes (their low byte is the kind) and PostgreSQL's SQLSTATE, told apart."""
    number = getattr(error.orig, "sqlite_errorcode", None)
    code = f"sqlite {number & 0xFF}" if number is not None else str(getattr(error.orig, "sqlstate", None) or "08")
    if code in (FULL, DISK_FULL):
        return StoreFull("the store's disk is full; delete jobs or wait", retry_after=60)
    if code in BUSY or (number is None and code.startswith(CONNECTION)):
        return StoreUnavailable("the store cannot be reached at the moment", retry_after=5)
    return StoreFailed("the store could not be read or written")


def sync_directory(folder: Path) -> None:
    """Have a directory's entries on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
