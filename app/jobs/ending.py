"""The end of jobs, whoever brings it about: what is written, and the webhooks that are due then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from app.errors import ServiceError
from app.jobs.store import Row, new_id
from app.jobs.tables import DELIVERIES, JOBS

OVER = ("completed", "failed", "cancelled")


def end(
    connection: sa.Connection, now: float, where: sa.ColumnElement[bool], status: str, values: Mapping[str, Any]
) -> list[Row]:
    """End the jobs for which `where` holds, with the webhooks that they asked for."""
    ended = {"status": status, "completed_at": now, "lease_owner": None, "lease_until": None, **values}
    update = sa.update(JOBS).where(where, JOBS.c.status.not_in(OVER)).values(ended).returning(JOBS)
    rows = list(connection.execute(update).mappings())
    for row in rows:
        if row["webhook_url"] is not None:
            delivery = {"id": new_id("msg"), "job_id": row["id"], "url": row["webhook_url"]}
            told = {"payload": told_of(row), "next_at": now, "attempts": 0}
            connection.execute(sa.insert(DELIVERIES).values(**delivery, **told))
    return rows


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
