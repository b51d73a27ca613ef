"""The tables of the store. Times are Unix seconds. A change here needs a migration: a test compares the two."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    String,
    Table,
    Text,
    UniqueConstraint,
    func,
    select,
)

METADATA = MetaData()
NUMBER = BigInteger().with_variant(Integer, "sqlite")

JOBS = Table(
    "jobs",
    METADATA,
    Column("seq", NUMBER, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("priority", String(16), nullable=False),
    Column("turn", Float, nullable=False),  # who has the smallest goes first
    Column("body", JSON, nullable=False),  # as resolved, without its pictures
    Column("digests", JSON, nullable=False),
    Column("fingerprint", String(64), nullable=False),  # of the body as it was sent
    Column("idempotency_key", String(255)),
    Column("webhook_url", Text),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("completed_at", Float),
    Column("step", Integer, nullable=False, default=0),
    Column("total_steps", Integer, nullable=False, default=0),
    Column("attempts", Integer, nullable=False, default=0),
    Column("lease_owner", String(64)),
    Column("lease_until", Float),
    Column("cancel", Boolean, nullable=False, default=False),  # asked of the server that runs it
    Column("error", JSON(none_as_null=True)),
    Column("result", JSON(none_as_null=True)),
    Column("size", BigInteger, nullable=False, default=0),  # bytes of its uploads and pictures
    Column("batch_id", String(64)),
    Column("line", Integer),
    Column("custom_id", Text),
    UniqueConstraint("owner", "idempotency_key", name="uq_jobs_idempotency"),
    Index("ix_jobs_turn", "status", "turn", "seq"),
    Index("ix_jobs_owner", "owner", "seq"),
    Index("ix_jobs_batch", "batch_id", "line"),
)

FILES = Table(
    "files",
    METADATA,
    Column("seq", NUMBER, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("filename", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Index("ix_files_owner", "owner", "seq"),
)

BATCHES = Table(
    "batches",
    METADATA,
    Column("seq", NUMBER, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("completion_window", String(16), nullable=False),
    Column("status", String(16), nullable=False),
    Column("attributes", JSON(none_as_null=True)),  # `metadata` on the wire
    Column("errors", JSON(none_as_null=True)),
    Column("offset", BigInteger, nullable=False, default=0),  # bytes of the input that have become jobs
    Column("line", Integer, nullable=False, default=0),  # lines of the input that have become jobs
    Column("total", Integer, nullable=False, default=0),
    Column("completed", Integer, nullable=False, default=0),  # of a batch that is over, whose jobs are gone
    Column("failed", Integer, nullable=False, default=0),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("created_at", Float, nullable=False),
    Column("in_progress_at", Float),
    Column("finalizing_at", Float),
    Column("cancelling_at", Float),
    Column("ended_at", Float),
    Column("expires_at", Float, nullable=False),
    Column("lease_owner", String(64)),
    Column("lease_until", Float),
    Index("ix_batches_owner", "owner", "seq"),
    Index("ix_batches_status", "status"),
)

DELIVERIES = Table(
    "deliveries",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("job_id", String(64), nullable=False),
    Column("url", Text, nullable=False),
    Column("payload", Text, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_at", Float, nullable=False),
    Index("ix_deliveries_next", "next_at"),
)

BLOBS = Table(
    "blobs",
    METADATA,
    Column("owner_id", String(64), primary_key=True),
    Column("name", String(32), primary_key=True),
    Column("part", Integer, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
)
"""What PostgreSQL keeps in rows, SQLite as files beside it."""


def count_where(*conditions: ColumnElement[bool]) -> Select[Any]:
    """How many jobs."""
    return select(func.count()).select_from(JOBS).where(*conditions)
