"""The real app over an engine without a device: pictures are flat colours, moments are made up, a run is a script."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from PIL import Image

from app.engine.job import Event, Failed, Finished, Job, Pixels, Preview, Progress, Queued
from app.errors import ServiceError
from app.http import service
from app.http.main import create_app
from app.http.service import Service
from app.settings import Settings
from models.costs.macs import Usage
from models.profiles.choice import Outlook
from models.spec import ModelSpec
from tests.unit.specs import dit_spec, unet_spec

COLOURS = [(200, 10, 30), (20, 190, 40), (30, 60, 210)]
"""What image i of a request looks like."""
DIM = [(90, 5, 15), (10, 80, 20), (15, 30, 99)]
"""What the previews of image i look like."""
USAGE = Usage(steps=3, rows=24, macs=1000, macs_unaccelerated=4500, evaluations=2)
QUEUED, STARTED, DENOISED, FINISHED = 10.0, 11.5, 15.0, 15.25
OPENED, ANSWERED = 9.0, 17.0


@dataclass
class Engine:
    """Stands in for `app.engine.engine.Engine`: answers a job at once with `script`, or with the usual events."""

    backbones: dict[str, Any]
    max_rows: dict[str, int]
    jobs: list[Job] = field(default_factory=list)
    cancelled: list[Job] = field(default_factory=list)
    refusal: ServiceError | None = None
    script: list[Event] | None = None
    now: float = OPENED
    wait: float = 0.0

    def clock(self) -> float:
        """A clock that stands still until a job is submitted."""
        return self.now

    def check(self) -> None:
        """Refuse where the test says so."""
        if self.refusal is not None:
            raise self.refusal

    def retry_after(self) -> int:
        """No prediction."""
        return 7

    def submit(self, job: Job) -> None:
        """Run a job, all at once."""
        self.jobs.append(job)
        for event in usual(job) if self.script is None else self.script:
            if isinstance(event, Finished | Failed):
                timing = job.timing
                timing.submitted, timing.started, timing.denoised, timing.finished = QUEUED, STARTED, DENOISED, FINISHED
                self.now = ANSWERED
            job.post(event)

    def outlook(self, model: str, rows: int, deadline: float) -> Outlook:
        """The wait that the test says, and a tenth of a second a row of a step."""
        return Outlook(self.wait, rows / 10, deadline)

    def cancel(self, job: Job) -> None:
        """Remember who was given up."""
        self.cancelled.append(job)


def flat(job: Job, colour: tuple[int, int, int]) -> Pixels:
    """A picture of a job's size in one colour, as the device hands it over."""
    return torch.tensor(colour, dtype=torch.uint8).repeat(job.run.height, job.run.width, 1)


def usual(job: Job) -> list[Event]:
    """Two in front of it, three steps, a preview of the second image and then one of the first, and all images."""
    images = range(len(job.run.seeds))
    previews = [Preview(flat(job, DIM[i]), step, i) for step, i in ((1, images[-1]), (2, 0))] if job.previews else []
    steps = [Progress(step, 3 * len(images)) for step in (1, 2, 3)] if job.progress else []
    finished = Finished([flat(job, COLOURS[i]) for i in images])
    return [Queued(2), *steps[:1], *previews[:1], *steps[1:2], *previews[1:], *steps[2:], finished]


@dataclass
class Faked:
    """The app, a client of it, and the engine that only pretends."""

    app: FastAPI
    client: httpx.AsyncClient
    engine: Engine

    @property
    def service(self) -> Service:
        """What the routes work with."""
        found: Service = self.app.state.service
        return found

    async def post(self, path: str = "/generate", headers: Mapping[str, str] | None = None, **body: Any) -> Any:
        """POST a JSON body with a prompt."""
        return await self.client.post(path, json={"prompt": "a ring"} | body, headers=dict(headers or {}))

    async def refused(self, path: str = "/generate", **body: Any) -> tuple[int, str | None, str]:
        """POST what is refused: the status, the field and the code."""
        answer = await self.post(path, **body)
        error = answer.json()["error"]
        return answer.status_code, error["param"], error["code"]

    def value(self, name: str, **labels: str) -> float:
        """A metric's value; 0 where it has never been counted."""
        found = self.app.state.metrics.registry.get_sample_value(f"slipstream_{name}", labels)
        return float(found or 0.0)


def specs() -> dict[str, ModelSpec]:
    """A U-Net whose student has another scale than its default, and a transformer; neither is square."""
    return {
        "unet": unet_spec(native_width=64, native_height=32, default_guidance_scale=7.5),
        "dit": dit_spec(native_width=96, native_height=32, adapters={}, default_steps=4),
    }


@asynccontextmanager
async def faked(
    patch: pytest.MonkeyPatch, models: Mapping[str, ModelSpec] | None = None, **settings: Any
) -> AsyncIterator[Faked]:
    """The app with a pretended engine behind it."""
    backbones = {
        name: SimpleNamespace(spec=spec, scheduler_config={}, group=lambda run: "one")
        for name, spec in (models or specs()).items()
    }
    app = create_app(Settings(model=tuple(backbones), **settings), {})
    engine = Engine(backbones, {name: 5 + i for i, name in enumerate(backbones)})
    patch.setattr(service, "usage", lambda backbone, run, ran: USAGE)
    patch.setattr(app.state.service, "engine", engine)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield Faked(app, client, engine)
    app.state.service.close()


def opened(b64_json: str) -> Image.Image:
    """The picture of an answer."""
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def colour(picture: Image.Image) -> Any:
    """The colour of a flat picture."""
    return picture.convert("RGB").getpixel((0, 0))


def request_of(picture: Image.Image) -> dict[str, Any]:
    """The request that a PNG says makes it again."""
    found: dict[str, Any] = json.loads(picture.text["slipstream"])  # type: ignore[attr-defined]
    return found
