"""From a validated body to a job: checks limits, resolves the run, hands it to the engine."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from app.adapters import AdapterFiles
from app.engine.engine import Engine
from app.engine.job import Job
from app.errors import Impossible, ModelNotFound, ServiceError
from app.http.counting import Counting, uncounted
from app.http.generation import Generation, Mailbox
from app.http.pictures import LONGEST_SIDE, decode_base64, pixels_of, read, read_as_is
from app.http.pool import Pool
from app.http.record import Record
from app.http.schemas.requests import GenerationRequest, control_picture
from app.http.schemas.responses import UsageBody
from app.http.waiting import REQUEST_BYTES, Pixels, Waiting, in_time
from app.logs import SERVER
from app.metrics import Metrics, acceleration_label
from app.settings import Settings
from models.backbone import Backbone
from models.costs.macs import usage
from models.errors import RequestError, cut
from models.request import Control, LoraScale, Request, Run
from models.resolve import plain_rows, resolve, wish_of
from models.reuse.plans import StepRows


@dataclass(frozen=True)
class Prepared:
    """A request that is possible: its model, its run, who may share a forward with it, the digests of its pictures."""

    model: str
    backbone: Backbone
    run: Run
    group: Hashable
    digests: Mapping[str, str]


class Service:
    """What the routes work with."""

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self.settings = settings
        self.engine = engine
        self.metrics = metrics
        self.pool = Pool()
        self.adapters = AdapterFiles(settings.data_dir, settings.store_bytes)
        self.counting = Counting()
        self.waiting = Waiting(settings.max_waiting_bytes, lambda: self.engine.retry_after())
        metrics.waiting_bytes.set_function(lambda: self.waiting.bytes)
        self._aliases = settings.aliases
        self._decoding = Pixels(settings.max_image_pixels)

    def close(self) -> None:
        """Let the threads go."""
        self.pool.close()
        self.counting.close()

    def model(self, name: str | None, field: str = "model") -> str:
        """A served model by its name or another that it has; the first where none is named. Raises `ModelNotFound`."""
        backbones = self.engine.backbones
        known = next(iter(backbones)) if name is None else self._aliases.get(name, name)
        if known not in backbones:
            served = ", ".join([*backbones, *self._aliases])
            raise ModelNotFound(f"{field}: {cut(known)!r} is not served; one of {served}", param=field)
        return known

    def also(self, name: str) -> list[str]:
        """The other names of a model."""
        return [alias for alias, model in self._aliases.items() if model == name]

    async def open(
        self, asked: GenerationRequest, record: Record, uploads: dict[str, bytes] | None = None
    ) -> Generation:
        """Check a request, resolve it and hand it to the engine. Raises what the client is to be told.

        Pictures are taken out of `uploads`, and out of the request: what is accepted keeps them in the model's size.
        """
        began, loop = self.engine.clock(), asyncio.get_running_loop()
        held = self.waiting.hold(0)
        try:
            pictures = dict(uploads or {})
            if uploads is not None:
                uploads.clear()
            prepared = await self.prepare(asked, record, pictures)
            asked.forget_pictures()
            pictures.clear()
            run, name = prepared.run, prepared.model
            held.resize(kept_bytes(run))
            mailbox = Mailbox(loop)
            job = Job(
                id=f"gen-{record.request_id}",
                model=name,
                run=run,
                acceleration=acceleration_label(run.accelerators),
                post=mailbox.post,
                kind=prepared.group,
                share=record.client,
                weight=record.weight,
                progress=asked.stream,
                previews=asked.partial_images if asked.stream else 0,
            )
            self.engine.submit(job)
            self._note_choice(job, record)
        except BaseException as error:
            held.free()
            if isinstance(error, ServiceError) and error.outcome == "rejected":
                self.metrics.rejected.labels(error.code).inc()
            raise
        return Generation(
            engine=self.engine,
            metrics=self.metrics,
            pool=self.pool,
            counting=self.counting,
            count=partial(self._usage, prepared.backbone, run),
            job=job,
            mailbox=mailbox,
            asked=asked,
            record=record,
            began=began,
            deadline=self._deadline(asked, record),
            held=held,
            digests=prepared.digests,
        )

    async def prepare(
        self, asked: GenerationRequest, record: Record, pictures: Mapping[str, bytes] | None = None
    ) -> Prepared:
        """Check a request and resolve it, where the engine takes work. Raises what the client is to be told.

        `pictures` that came as files stand in place of those in the request.
        """
        self.engine.check()
        name = self.model(asked.model)
        backbone = self.engine.backbones[name]
        record.model = name
        record.acceleration = acceleration_label(asked.accelerators)
        self.limit(asked)
        given = {**asked.pictures, **(pictures or {})}
        with self.waiting.hold(REQUEST_BYTES + sum(map(len, given.values()))):
            async with in_time(self._deadline(asked, record)):
                if not given:
                    run, group = await self.pool.run(self._resolve, backbone, asked, {}, name)
                    return Prepared(name, backbone, run, group, {})
                files, pixels = await self.pool.run(self._upload, given)
                async with self._decoding.take(pixels):
                    run, group = await self.pool.run(self._resolve, backbone, asked, files, name)
                return Prepared(name, backbone, run, group, await self.pool.run(_digests, files))

    def _deadline(self, asked: GenerationRequest, record: Record) -> float:
        """On the loop's clock, which is the monotonic one."""
        return record.arrived + (asked.timeout_seconds or self.settings.deadline_seconds)

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
        if asked.output_compression is not None and asked.output_compression < 100 and asked.output_format == "png":
            reason = "is for jpeg and webp; a png loses nothing"
            raise Impossible(f"output_compression: {reason}", param="output_compression")
        for name in ("prompt", "negative_prompt"):
            text = getattr(asked, name) or ""
            if len(text) > settings.max_prompt_length:
                most = settings.max_prompt_length
                raise Impossible(f"{name}: {len(text)} characters are more than this server's {most}", param=name)

    def _upload(self, given: Mapping[str, str | bytes]) -> tuple[dict[str, bytes], int]:
        """On a thread of the pool: uploaded files by field, and how many pixels they say that they have."""
        files = {name: decode_base64(one, name) if isinstance(one, str) else one for name, one in given.items()}
        return files, sum(pixels_of(data, self.settings.max_image_pixels, name) for name, data in files.items())

    def _resolve(
        self, backbone: Backbone, asked: GenerationRequest, files: Mapping[str, bytes], name: str
    ) -> tuple[Run, Hashable]:
        """On a thread of the pool: the uploaded pictures, then the library's checks; they get the run's size."""
        spec, limit, most = backbone.spec, self.settings.max_pixels, self.settings.max_image_pixels
        if limit == "auto":
            limit = 4 * spec.native_width * spec.native_height
        width, height = asked.width or spec.native_width, asked.height or spec.native_height
        if width * height > limit:
            field = "width" if asked.width is not None else "height"
            raise Impossible(f"{field}: {width}x{height} is more than this server's {limit} pixels", param=field)
        longest = LONGEST_SIDE.get(asked.output_format, limit)
        for field, side in {"width": width, "height": height}.items():
            if side > longest:
                message = f"{field}: {side} is more than the {longest} of a side of a {asked.output_format}"
                raise Impossible(message, param=field)
        request = Request(
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt,
            width=asked.width,
            height=asked.height,
            num_inference_steps=self._steps(asked, spec.default_steps),
            guidance_scale=asked.guidance_scale,
            true_cfg_scale=asked.true_cfg_scale,
            image_guidance_scale=asked.image_guidance_scale,
            seed=random.getrandbits(32) if asked.seed is None else asked.seed,
            num_images=asked.num_images,
            scheduler=asked.scheduler,
            image=read(files["image"], most).picture if "image" in files else None,
            strength=asked.strength,
            control=self._controls(asked, files),
            mask=read_as_is(files["mask"], most, "mask") if "mask" in files else None,
            timestep_warp=asked.timestep_warp,
            acceleration=asked.accelerators,
            quality=asked.quality,
            loras=[LoraScale(one.name, one.scale) for one in asked.loras],
            class_label=asked.class_label,
        )
        seconds = asked.timeout_seconds or self.settings.deadline_seconds
        outlook = None
        if wish_of(request) is not None:
            outlook = self.engine.outlook(name, plain_rows(spec, request) * asked.num_images, seconds)
        try:
            run = resolve(spec, backbone.scheduler_config, request, outlook)
        except RequestError:
            if not asked.quality_may_pass or asked.quality is None:
                raise
            asked.quality = None  # nothing was measured that it could choose from
            run = resolve(spec, backbone.scheduler_config, replace(request, quality=None))
        for info, _ in run.loras:  # here, so that the engine's thread need not read a file
            backbone.adapters.fetch(info)
        return run, backbone.group(run)

    def _steps(self, asked: GenerationRequest, usual: int) -> int | None:
        """As asked for; where nothing is, the model's default as far as the limit goes."""
        if asked.num_inference_steps is None and usual > self.settings.max_steps and asked.quality is None:
            return self.settings.max_steps
        return asked.num_inference_steps

    def _controls(self, asked: GenerationRequest, files: Mapping[str, bytes]) -> list[Control]:
        """What steers the picture, each with the picture that it sees."""
        found = []
        for i, one in enumerate(asked.controls):
            field = control_picture(i)
            if field not in files:
                raise Impossible(f"{field}: is required", param=field)
            picture = read(files[field], self.settings.max_image_pixels, field).picture
            found.append(Control(one.name, picture, one.scale, one.start, one.stop))
        return found

    def _note_choice(self, job: Job, record: Record) -> None:
        """Count what `auto` became; the request is known by what it runs from here on."""
        chosen = job.run.profile
        if chosen is None:
            return
        record.acceleration = job.acceleration
        record.facts |= {"profile": chosen.name, "candidate": chosen.candidate, "moved": chosen.moved}
        self.metrics.choices.labels(job.model, chosen.candidate).inc()
        self.metrics.moved.inc(chosen.moved)

    def _usage(self, backbone: Backbone, run: Run, ran: Sequence[Sequence[StepRows]] | None = None) -> UsageBody:
        """On the counting thread, while the engine works. What cannot be counted keeps no picture from its client."""
        try:
            return UsageBody(**asdict(usage(backbone, run, ran)))
        except Exception as error:
            SERVER.error("the MACs of a request could not be counted", exc_info=error)
            return uncounted(run)


def kept_bytes(run: Run) -> int:
    """What an accepted request keeps until it is answered."""
    pixels = run.width * run.height
    picture, mask = (0 if one is None else pixels for one in (run.request.image, run.request.mask))
    return REQUEST_BYTES + 4 * (picture + len(run.request.control) * pixels) + mask


def _digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
