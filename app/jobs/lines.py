"""Lines of a batch's files: read from a stream, checked, and answered. As OpenAI spells them; nothing else is known."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from models.errors import cut


def answered(request_id: str, custom_id: str, status: int | None, body: Mapping[str, Any]) -> bytes:
    """A line of an output or error file; without a status the line was never asked."""
    response = None if status is None else {"status_code": status, "request_id": request_id, "body": body}
    line = {"id": f"batch_req_{request_id}", "custom_id": custom_id, "response": response}
    return json.dumps(line | {"error": body if status is None else None}, separators=(",", ":")).encode() + b"\n"


def lines(chunks: Iterable[bytes], most_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a stream that are not blank, each with the offset behind it. ValueError for one that is too long."""
    buffer, offset = b"", 0
    for chunk in chunks:
        *whole, buffer = (buffer + chunk).split(b"\n")
        for line in whole:
            offset += len(line) + 1
            if len(line) > most_bytes:
                raise ValueError("a line is too long")
            if line.strip():
                yield offset, line
        if len(buffer) > most_bytes:
            raise ValueError("a line is too long")
    if buffer.strip():
        yield offset + len(buffer), buffer


def fault(line: bytes, endpoint: str, seen: set[str]) -> str | None:
    """What is wrong with a line of an input file. Notes its `custom_id` among the `seen`."""
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError):
        return "is not JSON, or nested too deeply"
    if not isinstance(asked, dict) or not isinstance(asked.get("body"), dict):
        return "is not an object with custom_id, method, url and body"
    custom_id = asked.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512:
        return "custom_id must be text of 1 to 512 characters"
    if "\0" in custom_id or any("\ud800" <= letter <= "\udfff" for letter in custom_id):
        return "custom_id must be text: it has a character that is none"
    if custom_id in seen:
        return f"custom_id {custom_id!r} is there twice"
    seen.add(custom_id)
    if asked.get("method") != "POST" or asked.get("url") != endpoint:
        return f"method and url must be POST {endpoint}, as the batch's endpoint"
    if unknown := set(asked) - {"custom_id", "method", "url", "body"}:
        return f"{cut(min(unknown))!r} is not a known field"
    return None


def error(line: int | None, code: str, message: str) -> dict[str, Any]:
    """What is wrong with a batch, as OpenAI spells it."""
    return {"code": code, "line": line, "message": message, "param": None}
