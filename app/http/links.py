"""Addresses of pictures, that whoever has one may read until it expires: in the store where there is one, else here."""

from __future__ import annotations

import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.errors import NotFound
from app.http.pictures import MEDIA_TYPES
from app.http.schemas.requests import OutputFormat

if TYPE_CHECKING:
    from app.jobs.files import Files

PREFIX = "/v1/images/links/"
OWNER = "link"
"""Whose files they are in the store: no client's, whose names are digests."""
NAME = re.compile(r"((?:file-)?[0-9a-f]{32})\.(png|jpeg|webp)")


@dataclass(frozen=True)
class Linked:
    """A picture that is kept, with its media type and the whole seconds that it still is."""

    data: bytes
    media_type: str
    seconds: int


class Links:
    """Keeps pictures for some time under names that nobody guesses. Without a store the oldest give way to new ones
    once there are too many bytes of them."""

    def __init__(
        self, seconds: float, max_bytes: int, files: Files | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._seconds, self._max_bytes, self._files, self._clock = seconds, max_bytes, files, clock
        self._kept: OrderedDict[str, tuple[bytes, float]] = OrderedDict()
        self.bytes = 0

    async def add(self, data: bytes, output_format: OutputFormat) -> str:
        """Keep a picture; its path on this server. Raises `StoreFull`."""
        if self._files is not None:
            name, add = f"picture.{output_format}", self._files.add
            row = await self._files.store.call(add, OWNER, name, [data], len(data), self._seconds, "image")
            return f"{PREFIX}{row['id']}.{output_format}"
        name = secrets.token_hex(16)
        self._kept[name] = data, self._clock() + self._seconds
        self.bytes += len(data)
        self._let_go()
        return f"{PREFIX}{name}.{output_format}"

    async def get(self, file: str) -> Linked:
        """The picture behind the last part of a path. Raises `NotFound` where there is none, or none any more."""
        self._let_go()
        if (match := NAME.fullmatch(file)) is None:
            raise _gone()
        name, media_type = match[1], {str(known): media for known, media in MEDIA_TYPES.items()}[match[2]]
        data, until = await self._stored(name) if self._files is not None else self._kept.get(name, (b"", 0.0))
        left = until - self._clock()
        if left <= 0:
            raise _gone()
        return Linked(data, media_type, int(left))

    async def _stored(self, name: str) -> tuple[bytes, float]:
        assert self._files is not None  # noqa: S101
        try:
            row = await self._files.store.call(self._files.get, name, OWNER)
        except NotFound:
            raise _gone() from None
        if row["expires_at"] <= self._clock():
            return b"", 0.0
        chunks = [chunk async for chunk in self._files.store.stream(name, "content")]
        return b"".join(chunks), row["expires_at"]

    def _let_go(self) -> None:
        """Of what has expired, and of the oldest where it is too much; the newest always stays."""
        now = self._clock()
        while self._kept and (
            next(iter(self._kept.values()))[1] <= now or (self.bytes > self._max_bytes and len(self._kept) > 1)
        ):
            _, (data, _) = self._kept.popitem(last=False)
            self.bytes -= len(data)


def _gone() -> NotFound:
    return NotFound("there is no picture at this address, or none any more")
