"""Pictures that were asked for as addresses (`response_format: url`)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.http.links import PREFIX, Links
from app.http.pictures import MEDIA_TYPES
from app.http.problems import RESPONSES

router = APIRouter(tags=["openai"])
FOUND: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture.",
        "content": {media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA_TYPES.values()},
    },
    404: RESPONSES[404],
}


@router.get(f"{PREFIX}{{name}}", response_class=Response, responses=FOUND, summary="A picture by its address")
async def linked(request: Request, name: str) -> Response:
    """A picture until it expires; whoever has its address needs no key."""
    links: Links = request.app.state.links
    found = await links.get(name)
    headers = {"Cache-Control": f"private, max-age={found.seconds}"}
    return Response(found.data, media_type=found.media_type, headers=headers)
