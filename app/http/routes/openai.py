"""The OpenAI Images routes: the same generations, spelled as that API spells them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import Response

from app.engine.job import Preview
from app.errors import Impossible, Malformed
from app.http.generation import Generation
from app.http.links import Links
from app.http.problems import RESPONSES
from app.http.routes.body import BodyRoute
from app.http.routes.common import respond, service_of
from app.http.routes.generate import events
from app.http.schemas.requests import PICTURES, ImagesRequest
from app.http.schemas.responses import ImagesBody
from models.errors import cut

router = APIRouter(prefix="/v1/images", tags=["openai"], route_class=BodyRoute)


def answers(prefix: str) -> dict[int | str, dict[str, Any]]:
    """What a route may answer, for the OpenAPI description."""
    content = {"text/event-stream": events(f"{prefix}.partial_image", f"{prefix}.completed")}
    described = {"model": ImagesBody, "description": "The images; as events with `stream`.", "content": content}
    return {200: described, **RESPONSES}


TEXT_FIELDS = frozenset(
    name
    for name, schema in ImagesRequest.model_json_schema()["properties"].items()
    if "string" in (schema.get("type"), *(choice.get("type") for choice in schema.get("anyOf", ())))
)
"""Fields of a form that are taken as they stand; the others are read as JSON."""
BRACKETS = re.compile(r"\[([^\[\]]*)\]")


@router.post(
    "/generations", response_class=Response, responses=answers("image_generation"), summary="Generate images (OpenAI)"
)
async def generations(request: Request, asked: Annotated[ImagesRequest, Body()]) -> Response:
    """Generate images as OpenAI's API does; every field of /generate may stand beside OpenAI's own."""
    return await respond(request, asked.plain(), finish(request, asked), partial(spell, "image_generation"))


FORM = ImagesRequest.model_json_schema(ref_template="#/components/schemas/{model}")
FILE = {"type": "string", "format": "binary"}
FORM_PROPERTIES = FORM["properties"] | {"image": FILE, "mask": {**FORM["properties"]["mask"], **FILE}}
EDIT_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": FORM_PROPERTIES,
                "required": ["prompt", "image"],
                "additionalProperties": False,
            }
        }
    },
}


@router.post(
    "/edits",
    response_class=Response,
    responses=answers("image_edit"),
    summary="Change an image (OpenAI)",
    openapi_extra={"requestBody": EDIT_BODY},
)
async def edits(request: Request) -> Response:
    """Image-to-image from a form: `image` is a file, and so is `mask`, transparent where the image is repainted.

    Structured fields are JSON or `acceleration[mode]=...`.
    """
    fields, uploads = await read_form(request)
    try:
        asked = ImagesRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    return await respond(request, asked.plain(), finish(request, asked), partial(spell, "image_edit"), uploads)


async def read_form(request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The fields of a form, nested where their names have brackets, and its files by field, for one to take out."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Malformed("the body must be multipart/form-data")
    limit = service_of(request).settings.max_body_bytes
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=3, max_fields=200, max_part_size=limit) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                field = name.removesuffix("[]")
                if field not in PICTURES or field in files:
                    raise Impossible(f"{cut(name)}: one file is taken as image, and one as mask", param=name)
                files[field] = await value.read()
            else:
                _place(fields, name, value)
    if "image" not in files:
        raise Impossible("image: a file is required", param="image")
    return fields, files


def _place(fields: dict[str, Any], name: str, value: str) -> None:
    """Put `a[b][c]=v` where it belongs."""
    path = [name.partition("[")[0], *BRACKETS.findall(name)]
    inner = fields
    for part in path[:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise Impossible(f"{cut(path[0])}: is given in two ways", param=path[0])
    if path[-1] in inner:
        raise Impossible(f"{cut(path[0])}: is given twice", param=path[0])
    inner[path[-1]] = value if path[0] in TEXT_FIELDS else _json(value)


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


Finish = Callable[[Generation], Coroutine[Any, Any, Response]]


def finish(request: Request, asked: ImagesRequest) -> Finish:
    """What makes an answer of a finished generation, with the images or with their addresses."""
    return partial(as_urls, request) if asked.response_format == "url" else as_json


async def as_json(generation: Generation) -> Response:
    """The finished generation as OpenAI answers."""
    return _answer(ImagesBody.of(await generation.result()), without="url")


async def as_urls(request: Request, generation: Generation) -> Response:
    """The same with addresses, at which the images can be read for some time."""
    links: Links = request.app.state.links
    body, files = await generation.result_files()
    paths = [await links.add(data, body.output_format) for data in files]
    root = service_of(request).settings.public_url or str(request.base_url)
    urls = [root.rstrip("/") + path for path in paths]
    return _answer(ImagesBody.of(body, generation.job.run.seeds, urls), without="b64_json")


def _answer(body: ImagesBody, without: str) -> Response:
    shown = body.model_dump_json(by_alias=True, exclude={"data": {"__all__": {without}}})
    return Response(shown, media_type="application/json")


async def spell(prefix: str, generation: Generation) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """OpenAI's events: partial images, then one `completed` an image."""
    run = generation.job.run
    shared = {"size": f"{run.width}x{run.height}", "output_format": generation.asked.output_format}
    shown = 0
    async for happened in generation.events():
        if isinstance(happened, Preview):
            data = await generation.preview(happened)
            kind = f"{prefix}.partial_image"
            facts = {
                "b64_json": data,
                "partial_image_index": shown,
                "step": happened.step,
                "created_at": int(time.time()),
            }
            yield kind, {"type": kind, **facts, **shared}
            shown += 1
    body = ImagesBody.of(await generation.body())
    facts = body.model_dump(mode="json", by_alias=True, exclude={"data", "created"})
    for image in body.data:
        kind = f"{prefix}.completed"
        yield kind, {"type": kind, "created_at": body.created, **image.model_dump(exclude={"url"}), **facts, **shared}
