"""/v1/files: the files that batches read and write, as OpenAI's SDK calls them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Annotated, Any, BinaryIO, Literal, cast

from fastapi import APIRouter, Query, Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response, StreamingResponse

from app.errors import Impossible, Malformed
from app.http.routes.common import service_of
from app.http.routes.jobs import FAILURES, Owner, Store
from app.http.schemas.batches import FileBody, FilesBody
from app.http.schemas.jobs import DeletedBody
from models.errors import cut

router = APIRouter(prefix="/v1/files", tags=["batches"])
CHUNK = 2**20
MEMORY_BYTES = 2**16
"""What of a file that is being sent stays in memory; a larger one is on the disk."""
AFTER = re.compile(r"expires_after\[(anchor|seconds)\]")
FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "purpose": {"enum": ["batch"]},
                    "file": {"type": "string", "format": "binary"},
                },
                "required": ["purpose", "file"],
            }
        }
    },
}


class Form(MultiPartParser):
    """A form with one file, which lies in a folder without a name there until it is in the store."""

    def __init__(self, request: Request, folder: Path | None) -> None:
        """`folder` None: the system's for what is temporary."""
        super().__init__(request.headers, request.stream(), max_files=1, max_fields=8)
        self._folder = folder

    async def parse(self) -> FormData:
        """The fields. Raises `Malformed`."""
        try:
            return await super().parse()
        except MultiPartException as error:
            raise Malformed(cut(error.message)) from error

    def on_headers_finished(self) -> None:
        """A part begins; one that is a file is put where there is room for it."""
        super().on_headers_finished()
        part = self._current_part
        if part.file is not None:
            part.file.file.close()
            file = SpooledTemporaryFile(MEMORY_BYTES, dir=None if self._folder is None else str(self._folder))  # noqa: SIM115
            self._files_to_close_on_error.append(file)
            part.file.file = cast(BinaryIO, file)


def shown(row: Any) -> FileBody:
    """A file as clients see it."""
    expires = None if row["expires_at"] is None else int(row["expires_at"])
    named = {"id": row["id"], "bytes": row["size"], "filename": row["filename"], "purpose": row["purpose"]}
    return FileBody(**named, created_at=int(row["created_at"]), expires_at=expires)


@router.post("", responses=FAILURES, openapi_extra={"requestBody": FORM}, summary="Upload a file (OpenAI)")
async def create(request: Request, store: Store, owner: Owner) -> FileBody:
    """Keep a file of lines for a batch."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Malformed("the body must be multipart/form-data")
    settings = service_of(request).settings
    form = await Form(request, settings.data_dir if settings.jobs_url is None else None).parse()
    try:
        fields = dict(form.multi_items())
        file = fields.pop("file", None)
        if not isinstance(file, UploadFile):
            raise Impossible("file: a file is required", param="file")
        if fields.pop("purpose", None) != "batch":
            raise Impossible("purpose: must be batch", param="purpose")
        keep = expires_after(fields)
        if fields:
            raise Impossible(f"{min(fields)}: is not a known field", param=min(fields))
        name = (file.filename or "batch.jsonl")[-255:]
        chunks = _chunks(file.file)
        # Not on the store's own thread, which on SQLite is one, and which running jobs need meanwhile.
        row = await asyncio.to_thread(store.files.add, owner, name, chunks, file.size or 0, keep)
    finally:
        await form.close()
    return shown(row)


def expires_after(fields: dict[str, Any]) -> float | None:
    """Seconds that a file is kept, taken out of a form: `expires_after[anchor]` and `expires_after[seconds]`."""
    found = {match[1]: fields.pop(name) for name in list(fields) if (match := AFTER.fullmatch(name))}
    if not found:
        return None
    seconds = str(found.get("seconds", ""))
    if found.get("anchor") != "created_at" or not seconds.isdecimal() or not 3600 <= int(seconds) <= 2_592_000:
        raise Impossible("expires_after: anchor must be created_at, seconds 3600 to 2592000", param="expires_after")
    return float(seconds)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


@router.get("", responses=FAILURES, summary="List files (OpenAI)")
async def listed(
    store: Store,
    owner: Owner,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    after: Annotated[str | None, Query(max_length=64)] = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=32)] = None,
) -> FilesBody:
    """Files by age."""
    rows, more = await store.store.call(store.files.page, owner, limit, after, order, purpose)
    ids = [row["id"] for row in rows] or [None]
    return FilesBody(data=[shown(row) for row in rows], first_id=ids[0], last_id=ids[-1], has_more=more)


@router.get("/{file_id}", responses=FAILURES, summary="One file (OpenAI)")
async def get(file_id: str, store: Store, owner: Owner) -> FileBody:
    """What a file is."""
    return shown(await store.store.call(store.files.get, file_id, owner))


LINES: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/jsonl": {"schema": {"type": "string", "format": "binary"}}},
        "description": "The file as it is, as a stream.",
    },
    **FAILURES,
}


@router.get("/{file_id}/content", response_class=Response, responses=LINES, summary="A file's content (OpenAI)")
async def content(file_id: str, store: Store, owner: Owner) -> Response:
    """The bytes of a file."""
    row = await store.store.call(store.files.get, file_id, owner)
    headers = {"Content-Length": str(row["size"])}
    return StreamingResponse(store.store.stream(row["id"], "content"), media_type="application/jsonl", headers=headers)


@router.delete("/{file_id}", responses=FAILURES, summary="Delete a file (OpenAI)")
async def delete(file_id: str, store: Store, owner: Owner) -> DeletedBody:
    """Forget a file."""
    await store.store.call(store.files.delete, file_id, owner)
    return DeletedBody(id=file_id, object="file")
