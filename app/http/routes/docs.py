"""GET /docs: Swagger UI from a package, not from a CDN, so that it opens offline and under the page policy."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

ASSETS = StaticFiles(packages=[("fastapi_offline", "static")])
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Slipstream API</title>
<link rel="icon" href="web/favicon.svg">
<link rel="stylesheet" href="docs-assets/swagger-ui.css">
<div id="docs"></div>
<script src="docs-assets/swagger-ui-bundle.js"></script>
<script src="web/docs.js"></script>
</html>
"""

router = APIRouter()


@router.get("/docs", include_in_schema=False)
async def docs() -> HTMLResponse:
    """The interface description, to read and to try."""
    return HTMLResponse(PAGE)
