"""/v1/models/{model}/adapters: the LoRAs of a model, added and removed with the admin key."""

from __future__ import annotations

import hmac
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile

from app.adapters import SUFFIX
from app.errors import AdminOnly, Impossible, Malformed, TooLarge
from app.http.middleware import key_in
from app.http.problems import RESPONSES
from app.http.routes.common import service_of
from app.http.routes.info import adapter_body, loaded
from app.http.schemas.jobs import DeletedBody
from app.http.schemas.responses import AdapterBody, AdaptersBody
from models.backbone import Backbone

router = APIRouter(prefix="/v1/models/{model_id}/adapters", tags=["models"])
FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "description": "Default the file's name without its ending."},
                    "file": {"type": "string", "format": "binary", "description": "A LoRA as safetensors."},
                },
                "required": ["file"],
            }
        }
    },
}
KNOWN: dict[int | str, dict[str, Any]] = {status: RESPONSES[status] for status in (404, 503)}
ADMIN: dict[int | str, dict[str, Any]] = {
    **KNOWN,
    **{status: RESPONSES[status] for status in (400, 413, 422)},
    403: {**RESPONSES[401], "description": "Not the admin key, or there is none."},
    409: {**RESPONSES[422], "description": "There is one of this name."},
    507: {**RESPONSES[500], "description": "No room; nothing was kept."},
}


@router.get("", responses=KNOWN, summary="A model's adapters")
async def listed(request: Request, model_id: str) -> AdaptersBody:
    """Students and styles, as the model has them now."""
    _, backbone = _model(request, model_id)
    return AdaptersBody(data=[adapter_body(info) for info in tuple(backbone.adapters.values())])


@router.post("", status_code=201, responses=ADMIN, openapi_extra={"requestBody": FORM}, summary="Add an adapter")
async def add(request: Request, model_id: str) -> AdapterBody:
    """Check a LoRA file, keep it, and offer it to requests from now on."""
    admin(request)
    model, backbone = _model(request, model_id)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Malformed("the body must be multipart/form-data")
    service = service_of(request)
    async with request.form(max_files=1, max_fields=4) as form:
        fields = dict(form.multi_items())
        file, name = fields.pop("file", None), fields.pop("name", None)
        if not isinstance(file, UploadFile):
            raise Impossible("file: a file is required", param="file")
        if fields:
            raise Impossible(f"{min(fields)}: is not a known field", param=min(fields))
        size = file.size or 0
        if size > service.settings.max_adapter_file_bytes:
            raise TooLarge(f"the file is larger than {service.settings.max_adapter_file_bytes} bytes")
        given = (file.filename or "").removesuffix(SUFFIX) if name is None else str(name)
        info = await service.pool.run(service.adapters.add, model, backbone, given, file.file, size)
    return adapter_body(info)


@router.delete("/{name}", responses=ADMIN, summary="Remove an adapter")
async def remove(request: Request, model_id: str, name: str) -> DeletedBody:
    """Offer it no more; pictures that are being drawn under it are finished with it."""
    admin(request)
    service, (model, backbone) = service_of(request), _model(request, model_id)
    await service.pool.run(service.adapters.remove, model, backbone, name)
    return DeletedBody(id=name, object="adapter")


def _model(request: Request, model_id: str) -> tuple[str, Backbone]:
    """A model by its name or another that it has. Raises `ModelNotFound`."""
    backbones = loaded(request).backbones
    name = service_of(request).model(model_id, "model_id")
    return name, backbones[name]


def admin(request: Request) -> None:
    """Raise `AdminOnly` where a request has not the admin key; compared in constant time."""
    key = service_of(request).settings.admin_key
    if key is None:
        raise AdminOnly("adapters are added and removed with the admin key only, and this server has none")
    given = key_in(request.headers.get("authorization", "").encode("latin-1"))
    if not hmac.compare_digest(given, key.get_secret_value().encode()):
        raise AdminOnly("give the admin key as 'Authorization: Bearer KEY'")
