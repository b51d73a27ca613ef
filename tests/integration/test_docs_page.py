"""The interface description opens without a network: everything the page asks for comes from this server."""

from __future__ import annotations

import asyncio
import re

import httpx

from app.http.main import create_app
from app.settings import Settings


def test_the_docs_page_is_served_whole() -> None:
    async def visit() -> dict[str, int]:
        transport = httpx.ASGITransport(create_app(Settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            page = await client.get("/docs")
            links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
            assert page.headers["Content-Security-Policy"]
            return {link: (await client.get(f"/{link}")).status_code for link in [*links, "openapi.json"]}

    statuses = asyncio.run(visit())
    assert len(statuses) >= 4
    assert set(statuses.values()) == {200}
