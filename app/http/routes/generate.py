"""POST /generate: Slipstream's own route, as JSON, as the bytes of one image, or as a stream of events."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Body, Header, Request
from starlette.responses import Response

from app.engine.job import Preview, Progress, Queued
from app.errors import Impossible
from app.http.generation import Generation
from app.http.pictures import MEDIA_TYPES
from app.http.problems import RESPONSES
from app.http.routes.body import BodyRoute
from app.http.routes.common import respond
from app.http.schemas.requests import GenerationRequest, OutputFormat
from app.http.schemas.responses import GenerationBody

router = APIRouter(tags=["generate"], route_class=BodyRoute)
QUALITY_VALUE = re.compile(r"[01](\.\d{0,3})?")
HEADER_CHARACTERS = 2048
"""Where what ran takes more, its lists of numbers are left out of the headers: proxies refuse long ones."""
IMAGE = {"schema": {"type": "string", "format": "binary"}}


def events(*names: str) -> dict[str, Any]:
    """How OpenAPI describes one event of a stream: its name, and data that is JSON."""
    data = {"type": "string", "contentMediaType": "application/json"}
    properties = {"event": {"enum": [*names, "error"]}, "data": data}
    return {"schema": {"type": "object", "properties": properties, "required": ["event", "data"]}}


EVENTS = events("queued", "progress", "partial_image", "completed")
GENERATED: dict[int | str, dict[str, Any]] = {
    200: {
        "model": GenerationBody,
        "description": "The images; as bytes with `Accept: image/*`, as events with `stream`.",
        "content": {**dict.fromkeys(MEDIA_TYPES.values(), IMAGE), "text/event-stream": EVENTS},
    },
    **RESPONSES,
}


@router.post("/generate", response_class=Response, responses=GENERATED, summary="Generate images")
async def generate(
    request: Request,
    asked: Annotated[GenerationRequest, Body()],
    accept: Annotated[str, Header(include_in_schema=False)] = "*/*",
) -> Response:
    """Generate images; each request chooses its own acceleration."""
    wanted = image_format(accept, asked.output_format)
    if wanted is None or asked.stream:
        return await respond(request, asked, as_json, spell)
    if asked.num_images > 1:
        raise Impossible("num_images: only one image can be sent as bytes; accept application/json", param="num_images")
    if "output_format" in asked.model_fields_set and wanted != asked.output_format:
        raise Impossible(f"output_format: {asked.output_format} is not what Accept asks for", param="output_format")
    asked = asked.model_copy(update={"output_format": wanted})
    return await respond(request, asked, as_image, spell)


def image_format(accept: str, default: OutputFormat) -> OutputFormat | None:
    """The image format that an Accept header prefers; None where JSON will do. Of equals, the first."""
    formats: dict[str, OutputFormat | None] = {media: name for name, media in MEDIA_TYPES.items()}
    formats |= {"image/*": default, "application/json": None, "application/*": None, "*/*": None}
    wanted = [(quality, formats[media]) for media, quality in _ranges(accept) if media in formats and quality > 0]
    return max(wanted, key=lambda one: one[0])[1] if wanted else None


def _ranges(accept: str) -> Iterator[tuple[str, float]]:
    """The media ranges of an Accept header with their q values; a q that is no number counts as 1."""
    for part in accept.lower().split(","):
        media, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((value for name, _, value in (p.partition("=") for p in parameters) if name.strip() == "q"), "1")
        yield media, float(quality) if QUALITY_VALUE.fullmatch(quality.strip()) else 1.0


async def as_json(generation: Generation) -> Response:
    """The finished generation as JSON."""
    body = await generation.result()
    return Response(body.model_dump_json(by_alias=True), media_type="application/json")


async def as_image(generation: Generation) -> Response:
    """The one image as bytes, its facts as headers."""
    body, [data] = await generation.result_files()
    facts: dict[str, Any] = {"id": body.id, "created": body.created, "model": body.model}
    facts |= {"seed": generation.job.run.seeds[0], "width": body.width, "height": body.height}
    facts |= {"output_format": body.output_format, **body.usage.model_dump(), **body.timing.model_dump()}
    ran = [a.model_dump(mode="json", by_alias=True) for a in body.acceleration]
    if len(json.dumps(ran)) > HEADER_CHARACTERS:
        ran = [{name: v for name, v in a.items() if not isinstance(v, list | tuple)} for a in ran]
    facts["acceleration"] = json.dumps(ran)
    facts["profile"] = None if body.profile is None else json.dumps(body.profile.model_dump(mode="json"))
    facts = {name: v if str(v).isascii() else quote(str(v)) for name, v in facts.items() if v is not None}
    headers = {"X-Slipstream-" + name.replace("_", "-").title(): str(v) for name, v in facts.items()}
    return Response(data, media_type=MEDIA_TYPES[body.output_format], headers=headers)


async def spell(generation: Generation) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """The events of a stream."""
    async for happened in generation.events():
        match happened:
            case Queued(position):
                yield "queued", {"position": position, "id": generation.job.id}
            case Progress(step, total_steps):
                yield "progress", {"step": step, "total_steps": total_steps}
            case Preview(_, step, index):
                data = await generation.preview(happened)
                yield "partial_image", {"b64_json": data, "step": step, "index": index}
    body = await generation.body()
    yield "completed", body.model_dump(mode="json", by_alias=True)
