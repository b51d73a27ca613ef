"""AUTOMATIC1111's API (/sdapi/v1) for the tools that speak it, with our acceleration as a setting.

Options, progress and interrupt, which that server has one of, are each client's own here: its key's, or its address's.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from starlette.responses import Response

from app.errors import ServiceError
from app.http.generation import Generation
from app.http.pictures import to_base64
from app.http.problems import RESPONSES, translate
from app.http.routes.body import BodyRoute
from app.http.routes.common import client_of, respond, service_of
from app.http.schemas.responses import GenerationBody
from app.http.schemas.webui import (
    SAMPLERS,
    SCHEDULES,
    ImageRequest,
    Lora,
    Model,
    Named,
    Options,
    Pictures,
    Progress,
    Scripts,
    TextRequest,
    settings_of,
)
from app.http.webui import Clients
from models.errors import RequestError

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"], route_class=BodyRoute)
ANSWERS: dict[int | str, dict[str, Any]] = {200: {"model": Pictures, "description": "The images."}, **RESPONSES}
THEIRS = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "scheduler": "sampler_name",
    "image": "init_images",
    "strength": "denoising_strength",
    "num_images": "batch_size",
    "model": "override_settings",
    "acceleration": "override_settings",
    "quality": "override_settings",
}
"""Our names of fields in theirs, for errors."""


@router.post("/txt2img", response_class=Response, responses=ANSWERS, summary="Generate images (AUTOMATIC1111)")
async def txt2img(request: Request, asked: Annotated[TextRequest, Body()]) -> Response:
    """Images from text."""
    return await _generate(request, asked)


@router.post("/img2img", response_class=Response, responses=ANSWERS, summary="Change an image (AUTOMATIC1111)")
async def img2img(request: Request, asked: Annotated[ImageRequest, Body()]) -> Response:
    """Images from text and a picture."""
    return await _generate(request, asked)


async def _generate(request: Request, asked: TextRequest) -> Response:
    plain = asked.plain(_clients(request).options(client_of(request)))
    sent = asked.model_dump(exclude={"init_images", "mask"}, exclude_unset=True)
    try:
        return await respond(request, plain, partial(_finish, request, asked.send_images, sent))
    except (ServiceError, RequestError) as raised:
        raise in_their_words(translate(raised)) from raised


def in_their_words(error: ServiceError) -> ServiceError:
    """An error that names the field as these tools do."""
    field, _, rest = (error.param or "").partition(".")
    if field in THEIRS:
        theirs = THEIRS[field] if THEIRS[field] != "override_settings" else f"override_settings.{field}"
        error.param = theirs + ("." + rest if rest else "")
        error.message = re.sub(rf"^{field}\b", theirs, error.message)
    return error


async def _finish(request: Request, send_images: bool, sent: dict[str, Any], generation: Generation) -> Response:
    """Wait for the images, or for the client's interrupt, which ends it with none."""
    with _clients(request).run(client_of(request), generation) as running:
        working = asyncio.ensure_future(generation.result_files())
        stopping = asyncio.ensure_future(running.interrupted.wait())
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            body, files = await working if working.done() else (None, list[bytes]())
        finally:
            working.cancel()
            stopping.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)
    info = _info(generation, body, sent)
    images = [to_base64(data) for data in files] if send_images else []
    return _json({"images": images, "parameters": sent, "info": json.dumps(info)})


def _info(generation: Generation, body: GenerationBody | None, sent: dict[str, Any]) -> dict[str, Any]:
    run, asked = generation.job.run, generation.asked
    sampler = next((theirs for theirs, ours in SAMPLERS.items() if ours == run.scheduler), run.scheduler)
    seeds = list(run.seeds)
    facts: dict[str, Any] = {
        "prompt": asked.prompt,
        "all_prompts": [asked.prompt] * len(seeds),
        "negative_prompt": asked.negative_prompt or "",
        "all_negative_prompts": [asked.negative_prompt or ""] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "width": run.width,
        "height": run.height,
        "sampler_name": sampler,
        "cfg_scale": run.guidance_scale,
        "steps": run.num_inference_steps,
        "batch_size": sent.get("batch_size", 1),
        "sd_model_name": generation.job.model,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime()),
        "interrupted": body is None,
    }
    text = f"{asked.prompt}\nNegative prompt: {asked.negative_prompt}" if asked.negative_prompt else asked.prompt
    shown = {"Steps": run.num_inference_steps, "Sampler": sampler, "CFG scale": run.guidance_scale}
    size = f"{run.width}x{run.height}"
    texts = [{**shown, "Seed": seed, "Size": size, "Model": generation.job.model} for seed in seeds]
    facts["infotexts"] = [text + "\n" + ", ".join(f"{k}: {v}" for k, v in one.items()) for one in texts]
    if body is not None:
        chosen = body.model_dump(mode="json", by_alias=True, include={"acceleration", "profile", "usage", "timing"})
        facts |= chosen
    return facts


@router.get("/progress", summary="How far the client's oldest request is (AUTOMATIC1111)")
async def progress(request: Request, skip_current_image: bool = False) -> Progress:
    """How far it is, and how many wait behind it. Half-done pictures are not shown."""
    running = _clients(request).running(client_of(request))
    if not running:
        return Progress(progress=0.0, eta_relative=0.0, state={"job": "", "job_count": 0, "sampling_step": 0})
    first = running[0]
    job, now = first.generation.job, service_of(request).engine.clock()
    taken = now - job.timing.started if job.timing.started else 0.0
    left = taken * (1 - first.progress) / first.progress if first.progress else 0.0
    state: dict[str, Any] = {
        "job": job.id,
        "job_no": 0,
        "job_count": len(running),
        "job_timestamp": "",
        "sampling_step": job.steps_done,
        "sampling_steps": job.total_steps,
        "interrupted": first.interrupted.is_set(),
        "skipped": False,
    }
    return Progress(progress=first.progress, eta_relative=left, state=state)


@router.post("/interrupt", summary="End the client's requests early (AUTOMATIC1111)")
async def interrupt(request: Request) -> dict[str, Any]:
    """End all of the client's requests on these routes: each answers at once, without images."""
    for running in _clients(request).running(client_of(request)):
        running.interrupted.set()
    return {}


@router.post("/skip", summary="End the client's oldest request early (AUTOMATIC1111)")
async def skip(request: Request) -> dict[str, Any]:
    """End the oldest one."""
    for running in _clients(request).running(client_of(request))[:1]:
        running.interrupted.set()
    return {}


@router.get("/options", responses={503: RESPONSES[503]}, summary="The client's options (AUTOMATIC1111)")
async def options(request: Request) -> Options:
    """What its requests go by."""
    service, kept = service_of(request), _clients(request).options(client_of(request))
    service.engine.check()
    name = service.model(kept.get("sd_model_checkpoint"))
    return Options(**{**kept, "sd_model_checkpoint": name})


@router.post("/options", responses=RESPONSES, summary="Set the client's options (AUTOMATIC1111)")
async def set_options(request: Request, given: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
    """Set some of them, for all requests on these routes from now on."""
    service, wanted = service_of(request), settings_of(given, "options")
    service.engine.check()
    if "sd_model_checkpoint" in wanted:
        wanted["sd_model_checkpoint"] = service.model(wanted["sd_model_checkpoint"], "sd_model_checkpoint")
    _clients(request).set(client_of(request), wanted)
    return {}


@router.get("/sd-models", responses={503: RESPONSES[503]}, summary="The models (AUTOMATIC1111)")
async def sd_models(request: Request) -> list[Model]:
    """All that are served."""
    service = service_of(request)
    service.engine.check()
    return [Model(title=name, model_name=name, filename=name) for name in service.engine.backbones]


@router.post("/refresh-checkpoints", summary="Nothing to refresh (AUTOMATIC1111)")
async def refresh_checkpoints() -> dict[str, Any]:
    """The list of models is always what is served."""
    return {}


@router.get("/samplers", summary="The samplers (AUTOMATIC1111)")
async def samplers() -> list[Named]:
    """Our schedulers under the names that these tools have for them."""
    return [Named(name=name, aliases=[ours]) for name, ours in SAMPLERS.items()]


@router.get("/schedulers", summary="How steps can be spaced (AUTOMATIC1111)")
async def schedulers() -> list[Named]:
    """Automatic, and Karras with DPM++ 2M."""
    return [Named(name=name.lower(), label=name) for name in SCHEDULES]


@router.get("/loras", responses={503: RESPONSES[503]}, summary="The LoRAs (AUTOMATIC1111)")
async def loras(request: Request) -> list[Lora]:
    """Those of the model that the client has chosen."""
    service = service_of(request)
    service.engine.check()
    name = service.model(_clients(request).options(client_of(request)).get("sd_model_checkpoint"))
    adapters = service.engine.backbones[name].spec.adapters.items()
    return [Lora(name=adapter, alias=adapter, path=adapter) for adapter, info in adapters if not info.student]


@router.get("/scripts", summary="No scripts (AUTOMATIC1111)")
async def scripts() -> Scripts:
    """There are none here."""
    return Scripts()


@router.get("/upscalers", summary="No upscalers (AUTOMATIC1111)")
async def upscalers() -> list[Named]:
    """There are none here."""
    return []


@router.get("/sd-vae", summary="No VAEs to choose (AUTOMATIC1111)")
async def sd_vae() -> list[Named]:
    """Each model has its own."""
    return []


def _clients(request: Request) -> Clients:
    clients: Clients = request.app.state.webui
    return clients


def _json(content: Any) -> Response:
    return Response(json.dumps(content), media_type="application/json")
