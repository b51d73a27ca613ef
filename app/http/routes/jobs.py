"""/v1/images/jobs: generations that survive their connection and the process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Query, Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response

from app.errors import Conflict, ServiceError, StoreOff
from app.http.pictures import MEDIA_TYPES
from app.http.problems import RESPONSES, body
from app.http.routes.common import digest_of_key, service_of
from app.http.routes.generate import IMAGE, events
from app.http.schemas.jobs import DeletedBody, JobBody, JobRequest, JobsBody, Status
from app.http.schemas.responses import ErrorBody

if TYPE_CHECKING:
    from app.jobs.service import JobService

router = APIRouter(prefix="/v1/images/jobs", tags=["jobs"])

FAILURES: dict[int | str, dict[str, Any]] = {
    status: RESPONSES.get(status, {"model": ErrorBody, "description": text})
    for status, text in {
        400: "",
        401: "",
        404: "",
        409: "Not in that state, or the same Idempotency-Key with another body.",
        413: "",
        422: "",
        429: "",
        500: "",
        503: "",
        507: "No room in the store; nothing was written.",
    }.items()
}
"""What the routes of the store may refuse with."""
END = "end"
WATCH_SECONDS = 1.0
ATTEMPT = 1_000_000
"""An event's id is its attempt times this, plus its step: it grows, whatever server the client comes back to."""


def store_of(request: Request) -> JobService:
    """The jobs behind the app. Raises `StoreOff` where there is no store."""
    jobs: JobService | None = request.app.state.jobs
    if jobs is None:
        raise StoreOff("this server keeps no jobs: it was started without --data-dir and --jobs-url")
    return jobs


def owner_of(request: Request) -> str:
    """Whose jobs a request may see: its key's, by a digest; everybody's are one where no key is asked for."""
    if not service_of(request).settings.api_keys:
        return ""
    return digest_of_key(request)


Store = Annotated[Any, Depends(store_of)]
Owner = Annotated[str, Depends(owner_of)]
Page = Annotated[int, Query(ge=1, le=100, description="How many at most.")]
After = Annotated[str | None, Query(max_length=64, description="The last id of the page before.")]


@router.post("", status_code=202, responses=FAILURES, summary="Submit a job")
async def submit(
    request: Request,
    response: Response,
    asked: Annotated[JobRequest, Body()],
    store: Store,
    owner: Owner,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="The same key and body: the same job.")
    ] = None,
) -> JobBody:
    """Accept a generation as a job: it is on the disk when this answers, and runs whatever becomes of the process."""
    row, _ = await store.submit(asked, owner, idempotency_key, request.state.record)
    response.headers["Location"] = f"/v1/images/jobs/{row['id']}"
    return await one(store, row)


@router.get("", responses=FAILURES, summary="List jobs")
async def listed(
    store: Store,
    owner: Owner,
    limit: Page = 20,
    after: After = None,
    status: Annotated[Status | None, Query(description="Only those in this state.")] = None,
) -> JobsBody:
    """Jobs, the latest first; those of batches are in their batch."""
    rows, more = await store.store.call(store.jobs.page, owner, limit, after, status)
    shown = await store.shown(rows)
    ids = [job.id for job in shown] or [None]
    return JobsBody(data=shown, first_id=ids[0], last_id=ids[-1], has_more=more)


@router.get("/{job_id}", responses=FAILURES, summary="One job")
async def get(job_id: str, store: Store, owner: Owner) -> JobBody:
    """A job: its state, its progress, what became of it."""
    return await one(store, await store.store.call(store.jobs.get, job_id, owner))


CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": dict.fromkeys(MEDIA_TYPES.values(), IMAGE), "description": "The picture."},
    **FAILURES,
}


@router.get("/{job_id}/content", response_class=Response, responses=CONTENT, summary="A picture of a job")
async def content(job_id: str, store: Store, owner: Owner, index: Annotated[int, Query(ge=0, le=9999)] = 0) -> Response:
    """One picture of a finished job, byte for byte as it was first made."""
    row = await store.store.call(store.jobs.get, job_id, owner)
    if row["status"] != "completed":
        raise Conflict(f"job_id: the job is {row['status']}", param="job_id")
    data = await store.picture(row, index)
    media = MEDIA_TYPES[row["body"].get("output_format", "png")]
    return Response(data, media_type=media, headers={"Cache-Control": "private, max-age=86400, immutable"})


STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": events("queued", "progress", "completed", "failed", "cancelled")},
        "description": "Events with ids; the last one has the job.",
    },
    204: {"description": "The last event was the end."},
    **FAILURES,
}


@router.get("/{job_id}/events", response_class=EventSourceResponse, responses=STREAM, summary="Follow a job")
async def follow(
    job_id: str,
    store: Store,
    owner: Owner,
    last_event_id: Annotated[str | None, Header(max_length=64, description="The last event that was seen.")] = None,
) -> Response:
    """A job's events from now on, or from the last one seen: the state it is in is always told first."""
    await store.store.call(store.jobs.get, job_id, owner)
    if last_event_id == END:
        return Response(status_code=204)
    seen = int(last_event_id) if last_event_id and last_event_id.isdecimal() else -1
    return EventSourceResponse(watch(store, job_id, owner, seen), ping=15, sep="\n")


@router.post("/{job_id}/cancel", responses=FAILURES, summary="Cancel a job")
async def cancel(job_id: str, store: Store, owner: Owner) -> JobBody:
    """Stop a job: one that runs frees its rows at the next tick. One that is cancelled already is answered the same."""
    row = await store.store.call(store.jobs.cancel, job_id, owner)
    store.runner.stop_job(job_id)
    return await one(store, row)


@router.delete("/{job_id}", responses=FAILURES, summary="Forget a job")
async def delete(job_id: str, store: Store, owner: Owner) -> DeletedBody:
    """Forget a job that is over, with its pictures."""
    await store.store.call(store.jobs.delete, job_id, owner)
    return DeletedBody(id=job_id, object="image.job")


async def one(store: JobService, row: Any) -> JobBody:
    """One job as it is shown."""
    return (await store.shown([row]))[0]


async def watch(store: JobService, job_id: str, owner: str, seen: int) -> AsyncIterator[ServerSentEvent]:
    """Events after `seen`: position and steps as they change, then how the job ended. Looks again after a second."""
    position = None
    while True:
        try:
            row = await store.store.call(store.jobs.get, job_id, owner)
            job = await one(store, row)
        except ServiceError as error:  # forgotten meanwhile, or the store is away
            yield ServerSentEvent(json.dumps(body(error)), event="error")
            return
        start = row["attempts"] * ATTEMPT
        if job.status in ("completed", "failed", "cancelled"):
            yield ServerSentEvent(job.model_dump_json(), event=job.status, id=END)
            return
        if job.status == "queued" and start >= seen and job.position != position:
            position, seen = job.position, start
            yield _event("queued", start, {"position": position})
        step, total = row["step"], row["total_steps"]
        while job.status == "in_progress":
            here = job_id in store.runner.running
            step, total = store.runner.progress(job_id) or (step, total)
            if start + step > seen:
                seen = start + step
                yield _event("progress", seen, {"step": step, "total_steps": total})
            if not here:
                break
            await store.runner.changed(job_id, WATCH_SECONDS)
        else:
            await store.runner.changed(job_id, WATCH_SECONDS)
        if job.status == "in_progress" and row["lease_owner"] != store.store.server:
            await store.runner.changed(job_id, WATCH_SECONDS)


def _event(name: str, number: int, data: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(data), event=name, id=str(number))
