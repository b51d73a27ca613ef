"""One accepted request from its handler's side: its events, and its answer as JSON or as a file."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from app.engine.engine import Engine
from app.engine.job import Event, Failed, Finished, Job, Pixels, Preview
from app.errors import ClientGone, DeadlineExceeded, ServiceError
from app.http.counting import Count, Counting
from app.http.pictures import encode, to_base64
from app.http.pool import Pool
from app.http.record import Record
from app.http.schemas.requests import PICTURES, GenerationRequest, control_picture
from app.http.schemas.responses import GeneratedImage, GenerationBody, ProfileBody, TimingBody, UsageBody
from app.http.waiting import Held, in_time
from app.metrics import Metrics
from models.families.vae import to_pictures
from models.reuse.plans import StepRows

_REPEATED = {"prompt", "negative_prompt", "class_label", "timestep_warp", "true_cfg_scale"}


class Mailbox:
    """Carries events from the engine thread to the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def post(self, event: Event) -> None:
        """Put an event in; any thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody is left to read
            return

    async def get(self) -> Event:
        """The next event."""
        return await self._events.get()


@dataclass(eq=False)
class Generation:
    """One accepted request, from its handler's side. Whoever opens it must `leave` it; `held` is its room till then."""

    engine: Engine
    metrics: Metrics
    pool: Pool
    counting: Counting
    count: Callable[[Sequence[Sequence[StepRows]] | None], UsageBody]
    """What it costs; given what its steps did where gates had decided."""
    job: Job
    mailbox: Mailbox
    asked: GenerationRequest
    record: Record
    began: float
    deadline: float
    held: Held
    digests: Mapping[str, str]
    """Of the pictures that came with it, by field."""
    finished: Finished | None = None
    costs: Count = field(init=False)
    _usage: UsageBody | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.costs = self.counting.begin(partial(self.count, None))

    async def events(self) -> AsyncIterator[Event]:
        """Every event up to `Finished`. Raises what the job failed with, or `DeadlineExceeded`."""
        while self.finished is None:
            async with in_time(self.deadline):
                event = await self.mailbox.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                self.finished = event
                if event.ran is not None:  # only now is it known what was computed
                    self.costs.cancel()
                    self.costs = self.counting.begin(partial(self.count, event.ran))
            yield event

    async def result(self) -> GenerationBody:
        """Wait for the images, and encode them for JSON."""
        async for _ in self.events():
            pass
        return await self.body()

    async def result_files(self) -> tuple[GenerationBody, list[bytes]]:
        """Wait for the images, and encode them as they are; the answer then has none."""
        async for _ in self.events():
            pass
        files = await self.files()
        return await self._body([]), files

    async def body(self) -> GenerationBody:
        """The answer of a finished generation."""
        files = await self.files()
        return await self._body(
            [
                GeneratedImage(b64_json=data, seed=seed)
                for data, seed in zip(await self.pool.run(_all_base64, files), self.job.run.seeds, strict=True)
            ]
        )

    async def _body(self, images: list[GeneratedImage]) -> GenerationBody:
        timing, run = self.job.timing, self.job.run
        costs = await self._known()
        return GenerationBody.model_construct(
            id=self.job.id,
            created=int(time.time()),
            model=self.job.model,
            images=images,
            acceleration=list(run.accelerators),
            profile=None if run.profile is None else ProfileBody.model_validate(asdict(run.profile)),
            usage=costs,
            timing=TimingBody(
                queue_seconds=round(timing.queue, 6),
                denoise_seconds=round(timing.denoise, 6),
                decode_seconds=round(timing.decode, 6),
                total_seconds=round(self.engine.clock() - self.began, 6),
            ),
            width=run.width,
            height=run.height,
            output_format=self.asked.output_format,
        )

    async def files(self) -> list[bytes]:
        """The images of a finished generation as files; counts them."""
        if self.finished is None:
            raise RuntimeError("wait for the generation first")
        metrics, timing = self.metrics, self.job.timing
        began = time.monotonic()
        async with in_time(self.deadline):
            files = [
                await self.pool.run(_file, image, self.asked, self.facts(seed), seed)
                for image, seed in zip(self.finished.images, self.job.run.seeds, strict=True)
            ]
        costs = await self._known()
        ended = time.monotonic()
        self.record.stages.append(("serialize", began, ended))
        for stage, seconds in (
            ("denoise", timing.denoise),
            ("decode", timing.decode),
            ("serialize", ended - began),
        ):
            metrics.stage_seconds.labels(stage).observe(seconds)
        metrics.images.labels(self.job.model).inc(len(files))
        if costs.macs is not None and costs.macs_unaccelerated is not None:
            metrics.macs.labels(self.job.model, "computed").inc(costs.macs)
            metrics.macs.labels(self.job.model, "saved").inc(max(0, costs.macs_unaccelerated - costs.macs))
        return files

    async def _known(self) -> UsageBody:
        """What it costs; what was not counted in time stays unknown."""
        if self._usage is None:
            self._usage = await self.counting.known(self.costs, self.job.run, self.deadline)
        return self._usage

    async def preview(self, event: Preview) -> str:
        """A partial image as base64."""
        seed = self.job.run.seeds[event.index]
        file = await self.pool.run(_file, event.image, self.asked, self.facts(seed), seed)
        return await self.pool.run(to_base64, file)

    def facts(self, seed: int) -> dict[str, Any]:
        """The request that makes one image again."""
        run, asked = self.job.run, self.asked
        facts = asked.model_dump(include=_REPEATED, exclude_none=True)
        return (
            facts
            | {
                "model": self.job.model,
                "width": run.width,
                "height": run.height,
                "num_inference_steps": run.num_inference_steps,
                "guidance_scale": run.guidance_scale,
                "scheduler": run.scheduler,
                "seed": seed,
                "acceleration": [a.model_dump(mode="json", by_alias=True) for a in run.accelerators],
            }
            | {f"{name}_sha256": self.digests[name] for name in PICTURES if name in self.digests}
            | ({"control": self._controls()} if asked.controls else {})
            | (self._by_picture() if "image" in self.digests else {})
        )

    def _by_picture(self) -> dict[str, float]:
        """What a picture was used with: how far its run went back, or how close an edit stayed to it."""
        scale, strength = self.job.run.image_guidance_scale, self.job.run.request.strength
        said = {"image_guidance_scale": scale, "strength": strength}
        return {name: value for name, value in said.items() if value is not None}

    def _controls(self) -> list[dict[str, Any]]:
        """What steered the picture, the pictures that it saw by their digests."""
        digests = (self.digests.get(control_picture(i)) for i in range(len(self.asked.controls)))
        pairs = zip(self.asked.controls, digests, strict=True)
        return [one.model_dump(exclude={"image"}) | {"image_sha256": digest} for one, digest in pairs]

    def leave(self, error: BaseException | None = None) -> None:
        """Nobody waits any more: what is not done is dropped at the next tick, and counted by its cause."""
        self.costs.cancel()
        self.held.free()
        self.record.stages[:0] = self.job.timing.stages(self.engine.clock())
        if self.finished is not None:
            return
        self.engine.cancel(self.job)
        if isinstance(error, DeadlineExceeded):
            self.metrics.cancelled.labels("deadline").inc()
        elif not isinstance(error, ServiceError) or isinstance(error, ClientGone):
            self.record.failed(ClientGone("the client left before its answer"))
            self.metrics.cancelled.labels("client").inc()
        elif error.status == 503:
            self.metrics.cancelled.labels("shutdown").inc()


def _file(pixels: Pixels, asked: GenerationRequest, facts: dict[str, Any], seed: int) -> bytes:
    """A decoded image as a file."""
    return encode(to_pictures(pixels[None])[0], asked.output_format, facts, seed, asked.output_compression)


def _all_base64(files: list[bytes]) -> list[str]:
    return [to_base64(file) for file in files]
