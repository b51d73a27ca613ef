"""/v1/batches: many lines of one file as jobs, as OpenAI's SDK calls it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body

from app.http.routes.jobs import FAILURES, After, Owner, Page, Store
from app.http.schemas.batches import BatchBody, BatchesBody, BatchRequest

router = APIRouter(prefix="/v1/batches", tags=["batches"])


async def one(store: Any, row: Any) -> BatchBody:
    """A batch as clients see it."""
    return BatchBody.of(row, await store.store.call(store.batches.counts, row))


@router.post("", responses=FAILURES, summary="Start a batch (OpenAI)")
async def create(asked: Annotated[BatchRequest, Body()], store: Store, owner: Owner) -> BatchBody:
    """Run every line of a file as a job behind all others; the answers become files."""
    named = (asked.endpoint, asked.input_file_id, asked.completion_window, asked.metadata)
    row = await store.store.call(store.batches.create, owner, *named)
    store.runner.wake()
    return await one(store, row)


@router.get("", responses=FAILURES, summary="List batches (OpenAI)")
async def listed(store: Store, owner: Owner, limit: Page = 20, after: After = None) -> BatchesBody:
    """Batches, the latest first."""
    rows, more = await store.store.call(store.batches.page, owner, limit, after)
    data = [await one(store, row) for row in rows]
    ids: list[str] | list[None] = [batch.id for batch in data] or [None]
    return BatchesBody(data=data, first_id=ids[0], last_id=ids[-1], has_more=more)


@router.get("/{batch_id}", responses=FAILURES, summary="One batch (OpenAI)")
async def get(batch_id: str, store: Store, owner: Owner) -> BatchBody:
    """How far a batch is."""
    return await one(store, await store.store.call(store.batches.get, batch_id, owner))


@router.post("/{batch_id}/cancel", responses=FAILURES, summary="Cancel a batch (OpenAI)")
async def cancel(batch_id: str, store: Store, owner: Owner) -> BatchBody:
    """Start no more lines; what is done is in the output file."""
    return await one(store, await store.store.call(store.batches.cancel, batch_id, owner))
