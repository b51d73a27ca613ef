"""From a validated body to a job and back: checks limits, resolves the run, waits for events, encodes the answer."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from app.engine import Engine
from app.errors import ClientGone, DeadlineExceeded, Impossible, ModelNotFound, ServiceError
from app.job import Event, Failed, Finished, Job, Preview
from app.metrics import Metrics, acceleration_label
from app.pictures import decode_base64, encode, read, to_base64
from app.record import Record
from app.schemas.requests import GenerationRequest
from app.schemas.responses import GeneratedImage, GenerationBody, TimingBody, UsageBody
from app.settings import Settings
from models.backbones.base import Backbone
from models.device import set_threads
from models.macs import Usage, usage
from models.request import Request, Run
from models.resolve import resolve

T = TypeVar("T")
CLERKS = 2
"""Threads for what is neither the loop's work nor the engine's: reading and writing pictures, checking runs.

Each computes alone: with a second team of OpenMP threads in the process, GCC's runtime takes the cores for
oversubscribed, puts waiting threads to sleep at once, and a step on the engine's thread takes twice as long.
"""


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
    """One accepted request, from its handler's side. Whoever opens it must `leave` it."""

    service: Service
    job: Job
    mailbox: Mailbox
    asked: GenerationRequest
    record: Record
    began: float
    deadline: float
    costs: asyncio.Future[Usage]
    picture_digest: str | None
    finished: Finished | None = None

    async def events(self) -> AsyncIterator[Event]:
        """Every event up to `Finished`. Raises what the job failed with, or `DeadlineExceeded`."""
        try:
            while self.finished is None:
                async with asyncio.timeout_at(self.deadline):
                    event = await self.mailbox.get()
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    self.finished = event
                yield event
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the images were done", param="timeout_seconds") from None

    async def result(self) -> GenerationBody:
        """Wait for the images, and encode them for JSON."""
        async for _ in self.events():
            pass
        return await self.body()

    async def result_bytes(self) -> tuple[GenerationBody, bytes]:
        """Wait for the image, and encode it as it is."""
        async for _ in self.events():
            pass
        files = await self.files()
        return await self._body([]), files[0]

    async def body(self) -> GenerationBody:
        """The answer of a finished generation."""
        files = await self.files()
        return await self._body(
            [
                GeneratedImage(b64_json=data, seed=seed)
                for data, seed in zip(await self.service.clerk(_all_base64, files), self.job.run.seeds, strict=True)
            ]
        )

    async def _body(self, images: list[GeneratedImage]) -> GenerationBody:
        timing, costs, run = self.job.timing, await self.costs, self.job.run
        return GenerationBody.model_construct(
            id=self.job.id,
            created=int(time.time()),
            model=self.job.model,
            images=images,
            acceleration=list(run.accelerators),
            usage=UsageBody(
                steps=costs.steps, rows=costs.rows, macs=costs.macs, macs_unaccelerated=costs.macs_unaccelerated
            ),
            timing=TimingBody(
                queue_seconds=round(timing.queue, 6),
                denoise_seconds=round(timing.denoise, 6),
                decode_seconds=round(timing.decode, 6),
                total_seconds=round(self.service.engine.clock() - self.began, 6),
            ),
            width=run.width,
            height=run.height,
            output_format=self.asked.output_format,
        )

    async def files(self) -> list[bytes]:
        """The images of a finished generation as files; counts them."""
        if self.finished is None:
            raise RuntimeError("wait for the generation first")
        metrics, timing = self.service.metrics, self.job.timing
        began = time.monotonic()
        files = [
            await self.service.clerk(encode, image, self.asked.output_format, self.facts(seed), seed)
            for image, seed in zip(self.finished.images, self.job.run.seeds, strict=True)
        ]
        costs = await self.costs
        for stage, seconds in (
            ("denoise", timing.denoise),
            ("decode", timing.decode),
            ("serialize", time.monotonic() - began),
        ):
            metrics.stage_seconds.labels(stage).observe(seconds)
        metrics.images.labels(self.job.model).inc(len(files))
        metrics.macs.labels(self.job.model, "computed").inc(costs.macs)
        metrics.macs.labels(self.job.model, "saved").inc(max(0, costs.macs_unaccelerated - costs.macs))
        return files

    async def preview(self, event: Preview) -> str:
        """A partial image as base64."""
        seed = self.job.run.seeds[event.index]
        file = await self.service.clerk(encode, event.image, self.asked.output_format, self.facts(seed), seed)
        return await self.service.clerk(to_base64, file)

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
            | ({} if self.picture_digest is None else {"image_sha256": self.picture_digest, "strength": asked.strength})
        )

    def leave(self, error: BaseException | None = None) -> None:
        """Nobody waits any more: what is not done is dropped at the next tick, and counted by its cause."""
        self.costs.cancel()
        if self.finished is not None:
            return
        self.service.engine.cancel(self.job)
        if isinstance(error, DeadlineExceeded):
            self.service.metrics.cancelled.labels("deadline").inc()
        elif not isinstance(error, ServiceError) or isinstance(error, ClientGone):
            self.record.failed(ClientGone("the client left before its answer"))
            self.service.metrics.cancelled.labels("client").inc()
        elif error.status == 503:
            self.service.metrics.cancelled.labels("shutdown").inc()


_REPEATED = {"prompt", "negative_prompt", "class_label", "timestep_warp"}


class Service:
    """What the routes work with."""

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self.settings = settings
        self.engine = engine
        self.metrics = metrics
        self._clerks = ThreadPoolExecutor(CLERKS, "clerk", initializer=set_threads, initargs=(1,))
        self._counting = threading.Lock()

    def close(self) -> None:
        """Let the clerks go."""
        self._clerks.shutdown(wait=False, cancel_futures=True)

    async def clerk(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do something off the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._clerks, partial(work, *arguments))

    def backbone(self, name: str | None) -> Backbone:
        """A served model; the first where none is named."""
        backbones = self.engine.backbones
        known = name if name is not None else next(iter(backbones))
        if known not in backbones:
            raise ModelNotFound(f"model: {known!r} is not served; one of {', '.join(backbones)}", param="model")
        return backbones[known]

    async def open(self, asked: GenerationRequest, record: Record, picture: bytes | None = None) -> Generation:
        """Check a request, resolve it and hand it to the engine. Raises what the client is to be told."""
        began, loop = self.engine.clock(), asyncio.get_running_loop()
        try:
            self.engine.check()
            name = asked.model if asked.model is not None else next(iter(self.engine.backbones))
            backbone = self.backbone(name)
            record.model = name
            record.acceleration = acceleration_label(asked.accelerators)
            self.limit(asked)
            run, digest = await self.clerk(self._resolve, backbone, asked, picture)
            mailbox = Mailbox(loop)
            job = Job(
                id=f"gen-{record.request_id}",
                model=name,
                run=run,
                acceleration=acceleration_label(run.accelerators),
                post=mailbox.post,
                progress=asked.stream,
                previews=asked.partial_images if asked.stream else 0,
            )
            self.engine.submit(job)
        except ServiceError as error:
            if error.outcome == "rejected":
                self.metrics.rejected.labels(error.code).inc()
            raise
        costs = loop.run_in_executor(self._clerks, self._usage, backbone, run)
        seconds = asked.timeout_seconds or self.settings.deadline_seconds
        return Generation(self, job, mailbox, asked, record, began, loop.time() + seconds, costs, digest)

    def limit(self, asked: GenerationRequest) -> None:
        """Hold a request against the settings. Raises `Impossible` with the field and the limit."""
        settings = self.settings
        for name, most in {
            "num_inference_steps": settings.max_steps,
            "num_images": settings.max_images,
            "timeout_seconds": settings.deadline_seconds,
        }.items():
            value = getattr(asked, name)
            if value is not None and value > most:
                raise Impossible(f"{name}: {value} is more than this server's {most}", param=name)
        for name in ("prompt", "negative_prompt"):
            text = getattr(asked, name) or ""
            if len(text) > settings.max_prompt_length:
                most = settings.max_prompt_length
                raise Impossible(f"{name}: {len(text)} characters are more than this server's {most}", param=name)

    def _resolve(self, backbone: Backbone, asked: GenerationRequest, data: bytes | None) -> tuple[Run, str | None]:
        """On a clerk's thread: the uploaded picture, then every check of the library."""
        spec, limit = backbone.spec, self.settings.max_pixels
        if limit == "auto":
            limit = 4 * spec.native_width * spec.native_height
        width, height = asked.width or spec.native_width, asked.height or spec.native_height
        if width * height > limit:
            field = "width" if asked.width is not None else "height"
            raise Impossible(f"{field}: {width}x{height} is more than this server's {limit} pixels", param=field)
        if data is None and asked.image is not None:
            data = decode_base64(asked.image)
        request = Request(
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt,
            width=asked.width,
            height=asked.height,
            num_inference_steps=asked.num_inference_steps,
            guidance_scale=asked.guidance_scale,
            seed=random.getrandbits(32) if asked.seed is None else asked.seed,
            num_images=asked.num_images,
            scheduler=asked.scheduler,
            image=None if data is None else read(data, self.settings.max_image_pixels),
            strength=asked.strength,
            timestep_warp=asked.timestep_warp,
            acceleration=asked.accelerators,
            class_label=asked.class_label,
        )
        run = resolve(spec, backbone.scheduler_config, request)
        return run, None if data is None else hashlib.sha256(data).hexdigest()

    def _usage(self, backbone: Backbone, run: Run) -> Usage:
        with self._counting:
            return usage(backbone, run)


def _all_base64(files: list[bytes]) -> list[str]:
    return [to_base64(file) for file in files]
