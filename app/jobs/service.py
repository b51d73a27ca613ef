"""What the routes of jobs work with: from a validated body to a job on the disk, and how a job is shown."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from app.errors import Impossible, NotFound, ServiceError
from app.http.pictures import decode_base64
from app.http.record import Record
from app.http.schemas.jobs import JobBody, JobImage, JobRequest
from app.http.schemas.requests import PICTURE_FIELDS, GenerationRequest
from app.jobs.batches import Batches
from app.jobs.driver import Driver
from app.jobs.files import Files
from app.jobs.queue import Jobs, NewJob, Priority
from app.jobs.retention import Retention
from app.jobs.runner import Runner
from app.jobs.store import Row, Store
from app.jobs.webhooks import Allowed, Webhooks
from app.settings import Settings

if TYPE_CHECKING:
    from app.http.service import Service

DAY = 86_400


class JobService:
    """The store, its queue, and who runs it, behind one server."""

    def __init__(self, settings: Settings, service: Service) -> None:
        """Open the store. Raises `StoreError` where that cannot be done."""
        url = settings.jobs_url.get_secret_value() if settings.jobs_url is not None else None
        self.store = Store(settings.data_dir, url, max_bytes=settings.store_bytes)
        self.jobs = Jobs(self.store, settings.max_jobs, settings.job_lease_seconds)
        self.keep_seconds = settings.keep_days * DAY
        retention = Retention(self.keep_seconds, settings.keep_jobs, settings.store_bytes)
        self.files = Files(self.store)
        self.batches = Batches(self.store, self.jobs, self.keep_seconds)
        self.webhooks: Webhooks | None = None
        self.driver = Driver(self.batches, self, settings)
        chores = [self.driver.advance]
        if settings.webhook_secret is not None and settings.webhook_origins:
            allowed = Allowed(settings.webhook_origins, settings.webhook_networks)
            secret = settings.webhook_secret.get_secret_value()
            self.webhooks = Webhooks(self.store, allowed, secret, service.metrics)
            chores.append(self.webhooks.deliver)
        self.runner = Runner(self.jobs, service, retention, chores)
        self._service = service

    async def start(self) -> None:
        """Take up what a process left, and run jobs from now on."""
        if not self.store.shared:
            await self.store.call(self.batches.let_go, whosever=True)
        await self.runner.start()

    async def stop(self) -> None:
        """Give back what is not done, and let the store go."""
        await self.runner.stop()
        with suppress(ServiceError):
            await self.store.call(self.batches.let_go)
        await asyncio.to_thread(self.store.close)

    async def submit(self, asked: JobRequest, owner: str, key: str | None, record: Record) -> tuple[Row, bool]:
        """Accept a job: on the disk when this returns. The job, and whether it is new."""
        if asked.webhook_url is not None:
            if self.webhooks is None:
                raise Impossible("webhook_url: this server calls no webhooks", param="webhook_url")
            self.webhooks.allowed.check(asked.webhook_url)
        plain = asked.plain()
        new = await self.prepare(plain, owner, record, asked.priority)
        fingerprint = await self._service.pool.run(_fingerprint, asked)
        job = NewJob(
            **{**vars(new), "fingerprint": fingerprint, "idempotency_key": key, "webhook_url": asked.webhook_url}
        )
        row, fresh = await self.store.call(self.jobs.submit, job)
        self.runner.wake()
        return row, fresh

    async def prepare(self, asked: GenerationRequest, owner: str, record: Record, priority: Priority) -> NewJob:
        """A request that is possible as a job, resolved: seed drawn, defaults filled in, its weights' digests noted."""
        pictures = {
            name: await self._service.pool.run(decode_base64, text, name) for name, text in asked.pictures.items()
        }
        prepared = await self._service.prepare(asked, record, pictures)
        run = prepared.run
        body = asked.model_dump(
            mode="json", by_alias=True, exclude_unset=True, exclude={**PICTURE_FIELDS, "stream": True}
        )
        body |= {
            "model": prepared.model,
            "width": run.width,
            "height": run.height,
            "num_inference_steps": run.num_inference_steps,
            "scheduler": run.scheduler,
            "seed": run.seeds[0],
        }
        body |= {"guidance_scale": run.guidance_scale} if run.adapter is None else {}
        loras = [info.name for info, _ in run.loras]
        controls = [one.name for one in run.request.controls]
        digests = await self._service.pool.run(
            self.runner.execution.digests, prepared.model, run.adapter, loras, controls
        )
        digests |= {"adapter_name": run.adapter} if run.adapter is not None else {}
        digests |= prepared.digests
        return NewJob(
            owner=owner,
            body={name: value for name, value in body.items() if value is not None},
            digests=digests,
            fingerprint="",
            priority=priority,
            uploads=pictures or None,
        )

    async def shown(self, rows: Sequence[Row]) -> list[JobBody]:
        """Jobs as clients see them."""
        positions = await self.store.call(self.jobs.positions, rows)
        return [self._body(row, positions.get(row["id"])) for row in rows]

    async def picture(self, row: Row, index: int) -> bytes:
        """One picture of a finished job, as a file. Raises `NotFound`."""
        if index >= len(row["result"]["seeds"]):
            raise NotFound(f"index: the job has {len(row['result']['seeds'])} pictures, from 0 on", param="index")
        return await self.store.call(lambda: b"".join(self.store.read(row["id"], f"picture-{index}")))

    def _body(self, row: Row, position: int | None) -> JobBody:
        body, result = row["body"], row["result"] or {}
        step, total = self.runner.progress(row["id"]) or (row["step"], row["total_steps"])
        done = row["status"] == "completed"
        asked = body.get("acceleration") or []
        seeds = result.get("seeds", [])
        return JobBody.model_validate(
            {
                "id": row["id"],
                "status": row["status"],
                "progress": 100 if done else 100 * step // total if total else 0,
                "position": position,
                "priority": row["priority"],
                "model": body["model"],
                "seed": body["seed"],
                "created_at": int(row["created_at"]),
                "started_at": _whole(row["started_at"]),
                "completed_at": _whole(row["completed_at"]),
                "expires_at": None if row["completed_at"] is None else int(row["completed_at"] + self.keep_seconds),
                "error": row["error"],
                "usage": result.get("usage"),
                "timing": result.get("timing"),
                "acceleration": result.get("acceleration", asked if isinstance(asked, list) else [asked]),
                "images": [
                    JobImage(index=i, seed=seed, url=f"/v1/images/jobs/{row['id']}/content?index={i}")
                    for i, seed in enumerate(seeds)
                ],
                "output_format": body.get("output_format", "png"),
                "request": body,
                "has_image": "image" in row["digests"],
            }
        )


def _whole(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


def _fingerprint(asked: JobRequest) -> str:
    """Equal for bodies that ask for the same."""
    body: Mapping[str, Any] = asked.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
