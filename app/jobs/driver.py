"""Drives batches: their files become jobs a window at a time, and what became of these becomes files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from app.errors import FileGone, Impossible, QueueFull, ServiceError, Unavailable
from app.http.problems import translate
from app.http.record import Record
from app.http.schemas.requests import ImagesRequest
from app.jobs.batches import WINDOW, Batches
from app.jobs.ending import described
from app.jobs.lines import error
from app.jobs.outcome import Outcome
from app.jobs.queue import NewJob
from app.jobs.store import Row
from app.logs import SERVER
from app.settings import Settings

if TYPE_CHECKING:
    from app.jobs.service import JobService

AT_ONCE = 16
"""Lines that become jobs in one transaction."""


class Driver:
    """Takes every batch of the store one step further each time it is asked to."""

    def __init__(self, batches: Batches, service: JobService, settings: Settings) -> None:
        self._batches = batches
        self._outcome = Outcome(batches)
        self._service = service
        self._settings = settings

    async def advance(self) -> None:
        """A step of every batch whose lease this server gets."""
        for row in await self._batches.store.call(self._batches.active):
            try:
                await self._advance(row)
            except FileGone:
                await self._end_without_input(row)
            except ServiceError as error:  # of the store: tried again at the next step
                SERVER.error("batch %s waits: %s", row["id"], error)
            except Exception as error:  # no batch stands in the way of another
                SERVER.error("batch %s", row["id"], exc_info=error)

    async def _advance(self, row: Row) -> None:
        batches, call = self._batches, self._batches.store.call
        most_bytes = self._settings.max_body_bytes
        if row["status"] == "validating":
            await asyncio.to_thread(batches.validate, row, self._settings.max_batch_lines, most_bytes)
            self._service.runner.wake()
            return
        late = batches.store.clock() > row["expires_at"]
        if row["status"] == "cancelling" or late:
            await call(batches.stop, row)
        unfinished = await call(batches.unfinished, row)
        whole = row["line"] >= row["total"]
        if row["status"] == "in_progress" and not late and not whole:
            await self._feed(row, WINDOW - unfinished)
        elif not unfinished:
            status = "cancelled" if row["status"] == "cancelling" else "completed" if whole and not late else "expired"
            if whole and late and not await call(batches.cut, row):
                status = "completed"  # all were done when the time was up
            await asyncio.to_thread(self._outcome.finalize, row, status, most_bytes)

    async def _end_without_input(self, row: Row) -> None:
        """The input was deleted: no further line can begin. Those that have are seen to their end, and kept."""
        if await self._batches.store.call(self._batches.unfinished, row):
            return
        gone = [error(None, "missing_file", "the input file was deleted before all of its lines had begun")]
        await asyncio.to_thread(self._outcome.finalize, row, "failed", self._settings.max_body_bytes, gone)

    async def _feed(self, row: Row, room: int) -> None:
        """Make the next lines jobs; where the engine takes no work, later."""
        if room < AT_ONCE:
            return
        call = self._batches.store.call
        found = await call(self._batches.next_lines, row, AT_ONCE, self._settings.max_body_bytes)
        try:
            jobs = [await self._job(row, row["line"] + i, json.loads(line)) for i, (_, line) in enumerate(found)]
        except (Unavailable, QueueFull):
            return
        if jobs:
            await call(self._batches.feed, row, jobs, found[-1][0])
            self._service.runner.wake()

    async def _job(self, row: Row, number: int, line: Mapping[str, Any]) -> NewJob:
        """A line as a job; one that is not possible is over at once, with its error."""
        of_batch = {"batch_id": row["id"], "line": number, "custom_id": line["custom_id"]}
        try:
            asked = ImagesRequest.model_validate(line["body"])
            if asked.stream:
                raise Impossible("stream: is not for batches", param="stream")
            if asked.response_format == "url":
                raise Impossible("response_format: a batch writes b64_json", param="response_format")
            if row["endpoint"].endswith("edits") and asked.image is None:
                raise Impossible("image: is required, as base64", param="image")
            new = await self._service.prepare(asked.plain(), row["owner"], Record(f"{row['id']}-{number}"), "batch")
        except (Unavailable, QueueFull):
            raise
        except Exception as raised:
            if isinstance(raised, ValidationError):
                raised = RequestValidationError(raised.errors())
            known = translate(raised)
            return NewJob(row["owner"], {}, {}, "", "batch", error=described(known), **of_batch)
        return NewJob(**{**vars(new), **of_batch})
