"""One job of the store, run in the engine as a live request is run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from app.engine.job import Progress
from app.errors import ClientGone, ModelChanged, QueueFull, ServiceError, Unavailable
from app.http.problems import translate
from app.http.record import Record
from app.http.schemas.requests import PICTURES, GenerationRequest, control_picture
from app.jobs.queue import Jobs
from app.jobs.store import Row
from app.logs import SERVER

if TYPE_CHECKING:
    from app.http.service import Service

LORA = "lora "
"""Before the name of a style, among the digests of what a job runs on."""


@dataclass(eq=False)
class Running:
    """One job that this server runs."""

    row: Row
    suspect: bool
    task: asyncio.Task[None] | None = None
    step: int = 0
    total: int = 0
    begun: bool = False
    cancelled: bool = False
    ended: bool = False


class Execution:
    """Runs jobs in the engine of a service."""

    def __init__(self, jobs: Jobs, service: Service) -> None:
        self.jobs = jobs
        self.service = service

    async def run(self, running: Running, tell: Callable[[], None]) -> Callable[[], object]:
        """Run a job: what to write into the store then. `tell` is called at every step.

        Raises `Unavailable` (with `EngineDead`) or `QueueFull` where the engine does not take it, or cannot end it.
        """
        row = running.row
        job_id = row["id"]
        try:
            asked = GenerationRequest.model_validate({**row["body"], "stream": True})
            pictures = await self._pictures(row)
            await self._same_weights(row)
            record = Record(job_id, client=f"{row['priority']} jobs of {row['owner']}")
            generation = await self.service.open(asked, record, pictures)
            error: BaseException | None = ClientGone("the job was stopped")
            try:
                async for event in generation.events():
                    if isinstance(event, Progress):
                        running.step, running.total = event.step, event.total_steps
                        tell()
                body, files = await generation.result_files()
                error = None
            except ServiceError as raised:
                error = raised
                raise
            finally:
                generation.leave(error)
        except (Unavailable, QueueFull):
            raise
        except Exception as raised:
            known = translate(raised)
            if known.status >= 500:
                SERVER.error("job %s failed: %s", job_id, known.message, exc_info=raised)
            return partial(self.jobs.leases.fail, job_id, known)
        result = body.model_dump(mode="json", by_alias=True, exclude={"id", "created", "model", "images"})
        result["seeds"] = list(generation.job.run.seeds)
        return partial(self.jobs.leases.complete, job_id, result, files)

    async def _pictures(self, row: Row) -> dict[str, bytes]:
        controls = map(control_picture, range(len(row["body"].get("control") or ())))
        store, names = self.jobs.store, [name for name in (*PICTURES, *controls) if name in row["digests"]]
        return {name: await store.call(lambda name=name: b"".join(store.read(row["id"], name))) for name in names}

    async def _same_weights(self, row: Row) -> None:
        """Raise `ModelChanged` where the job's picture would be another than when it was accepted."""
        kept = row["digests"]
        loras = [name.removeprefix(LORA) for name in kept if name.startswith(LORA)]
        body, adapter = row["body"], kept.get("adapter_name")
        controls = [one["name"] for one in body.get("control") or ()]
        digests = await self.service.pool.run(self.digests, body["model"], adapter, loras, controls)
        changed = [name for name, digest in digests.items() if row["digests"].get(name) != digest]
        if changed:
            raise ModelChanged(f"the {changed[0]} has other weights than when the job was accepted", param=changed[0])

    def digests(
        self, model: str, adapter: str | None, loras: Sequence[str] = (), controls: Sequence[str] = ()
    ) -> dict[str, str]:
        """The digests of what a job runs on, by what it is."""
        backbone = self.service.engine.backbones[model]
        found = {"model": backbone.digest}
        if adapter is not None and adapter in backbone.adapters:
            found["adapter"] = backbone.adapters.digest(backbone.adapters[adapter])
        known = dict(backbone.adapters)
        found |= {f"{LORA}{name}": backbone.adapters.digest(known[name]) for name in loras if name in known}
        networks = (name for name in controls if name in backbone.controls)
        return found | {f"control network {name}": backbone.control_digest(name) for name in networks}
