"""The batches of the store: rows, and what is read from and written into their files, as streams."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from app.errors import Conflict, FileGone, NotFound, QueueFull, StoreFailed
from app.http.problems import body as body_of
from app.jobs.files import CONTENT, described
from app.jobs.queue import OVER, Jobs, NewJob, count_where
from app.jobs.store import PAGE, Row, Store, new_id
from app.jobs.tables import BATCHES, FILES, JOBS
from models.errors import cut

ACTIVE = ("validating", "in_progress", "cancelling", "finalizing")
MOST = 1000
"""Batches that are not over."""
WINDOW = 256
"""Lines of one batch that are jobs at a time and not over: the rest of its file stays a file."""
MOST_ERRORS = 100
LEASE_SECONDS = 60.0
CREATED_PAGE = 20


class Batches:
    """What can be done with the batches of a store. Any thread may call."""

    def __init__(self, store: Store, jobs: Jobs, keep_seconds: float) -> None:
        self.store = store
        self.jobs = jobs
        self.keep_seconds = keep_seconds

    # From the routes

    def create(self, owner: str, endpoint: str, file_id: str, window: str, attributes: Any) -> Row:
        """A batch over a file of the owner's. Raises `NotFound`, `QueueFull`."""
        now = self.store.clock()
        with self.store.begin() as connection:
            where = (FILES.c.id == file_id, FILES.c.owner == owner, FILES.c.purpose == "batch")
            if connection.execute(sa.select(FILES.c.id).where(*where)).scalar() is None:
                raise NotFound(f"input_file_id: there is no file {file_id!r} for batches", param="input_file_id")
            active = sa.select(sa.func.count()).select_from(BATCHES).where(BATCHES.c.status.in_(ACTIVE))
            if connection.execute(active).scalar_one() >= MOST:
                raise QueueFull(f"{MOST} batches are under way already", retry_after=60)
            insert = sa.insert(BATCHES).values(
                id=new_id("batch"),
                owner=owner,
                endpoint=endpoint,
                input_file_id=file_id,
                completion_window=window,
                status="validating",
                attributes=attributes,
                created_at=now,
                expires_at=now + 3600 * int(window.removesuffix("h")),
            )
            return connection.execute(insert.returning(BATCHES)).mappings().one()

    def get(self, batch_id: str, owner: str | None) -> Row:
        """One batch of an owner's. Raises `NotFound`."""
        where = [BATCHES.c.id == batch_id] + ([] if owner is None else [BATCHES.c.owner == owner])
        rows = self.store.rows(sa.select(BATCHES).where(*where))
        if not rows:
            raise NotFound(f"batch_id: there is no batch {batch_id!r}", param="batch_id")
        return rows[0]

    def page(self, owner: str, limit: int, after: str | None) -> tuple[list[Row], bool]:
        """An owner's batches, the latest first, and whether there are more."""
        query = sa.select(BATCHES).where(BATCHES.c.owner == owner).order_by(BATCHES.c.seq.desc()).limit(limit + 1)
        if after is not None:
            query = query.where(BATCHES.c.seq < self.get(after, owner)["seq"])
        rows = self.store.rows(query)
        return rows[:limit], len(rows) > limit

    def cancel(self, batch_id: str, owner: str) -> Row:
        """Start no more of a batch's lines. Raises `Conflict` for one that is over."""
        row = self.get(batch_id, owner)
        if row["status"] not in (*ACTIVE, "cancelled") or row["status"] == "finalizing":
            raise Conflict(f"batch_id: the batch is {row['status']} already", param="batch_id")
        with self.store.begin() as connection:
            going = BATCHES.c.status.in_(("validating", "in_progress"))
            ask = sa.update(BATCHES).where(BATCHES.c.id == batch_id, going)
            connection.execute(ask.values(status="cancelling", cancelling_at=self.store.clock()))
        return self.get(batch_id, owner)

    def counts(self, row: Row) -> dict[str, int]:
        """Lines in all, completed and failed."""
        if row["ended_at"] is not None:
            return {name: row[name] for name in ("total", "completed", "failed")}
        query = sa.select(JOBS.c.status, sa.func.count().label("n")).where(JOBS.c.batch_id == row["id"])
        found = {r["status"]: r["n"] for r in self.store.rows(query.group_by(JOBS.c.status))}
        return {"total": row["total"], "completed": found.get("completed", 0), "failed": found.get("failed", 0)}

    # From who drives them

    def active(self) -> list[Row]:
        """Batches that are not over and that this server may drive: it has their lease from now on."""
        now = self.store.clock()
        free = sa.or_(
            BATCHES.c.lease_owner.is_(None), BATCHES.c.lease_owner == self.store.server, BATCHES.c.lease_until < now
        )
        with self.store.begin() as connection:
            update = sa.update(BATCHES).where(BATCHES.c.status.in_(ACTIVE), free)
            lease = {"lease_owner": self.store.server, "lease_until": now + LEASE_SECONDS}
            return list(connection.execute(update.values(lease).returning(BATCHES)).mappings())

    def let_go(self, *, whosever: bool = False) -> None:
        """Give up this server's leases; whosever they are where it holds the store alone."""
        with self.store.begin() as connection:
            mine = sa.true() if whosever else BATCHES.c.lease_owner == self.store.server
            connection.execute(sa.update(BATCHES).where(mine).values(lease_owner=None))

    def validate(self, row: Row, most_lines: int, most_bytes: int) -> None:
        """Read a batch's file once, as a stream: it goes on, or fails with what is wrong with which line."""
        total, errors, seen = 0, list[dict[str, Any]](), set[str]()
        try:
            for total, (_, line) in enumerate(lines(self.store.read(row["input_file_id"], CONTENT), most_bytes), 1):
                if total > most_lines:
                    errors = [error(None, "too_many_lines", f"more than {most_lines} lines")]
                    break
                wrong = fault(line, row["endpoint"], seen)
                if wrong is not None and len(errors) < MOST_ERRORS:
                    errors.append(error(total, "invalid_line", wrong))
        except ValueError:
            errors.append(error(total + 1, "line_too_long", f"a line is longer than {most_bytes} bytes"))
        if not total and not errors:
            errors = [error(None, "empty_file", "the file has no lines")]
        now = self.store.clock()
        values: dict[str, Any] = {"status": "in_progress", "in_progress_at": now, "total": total}
        if errors:
            values = {"status": "failed", "ended_at": now, "errors": errors, "total": total}
        self._update(row, values, "validating")

    def _update(self, row: Row, values: Mapping[str, Any], *statuses: str) -> None:
        with self.store.begin() as connection:
            where = (BATCHES.c.id == row["id"], BATCHES.c.status.in_(statuses))
            connection.execute(sa.update(BATCHES).where(*where).values(values))

    def unfinished(self, row: Row) -> int:
        """Lines of a batch that are jobs and not over."""
        with self.store.begin() as connection:
            mine = (JOBS.c.batch_id == row["id"], JOBS.c.status.not_in(OVER))
            return int(connection.execute(count_where(*mine)).scalar_one())

    def next_lines(self, row: Row, count: int, most_bytes: int) -> list[tuple[int, bytes]]:
        """The next lines of a batch that are no jobs yet, each with the offset behind it."""
        chunks = self.store.read(row["input_file_id"], CONTENT, row["offset"])
        found = []
        for offset, line in lines(chunks, most_bytes):
            found.append((row["offset"] + offset, line))
            if len(found) == count:
                break
        return found

    def feed(self, row: Row, jobs: Sequence[NewJob], offset: int) -> None:
        """Make the next lines of a batch jobs, all or none; nothing where somebody else has."""
        with self.store.begin() as connection:
            where = (BATCHES.c.id == row["id"], BATCHES.c.line == row["line"], BATCHES.c.status == "in_progress")
            update = sa.update(BATCHES).where(*where).values(line=row["line"] + len(jobs), offset=offset)
            if connection.execute(update).rowcount:
                self.jobs.insert_all(connection, jobs)

    def cut(self, row: Row) -> bool:
        """Whether a line of a batch was cancelled."""
        with self.store.begin() as connection:
            mine = (JOBS.c.batch_id == row["id"], JOBS.c.status == "cancelled")
            return bool(connection.execute(count_where(*mine)).scalar_one())

    def stop(self, row: Row) -> None:
        """Cancel what a batch has waiting, ask for the end of what it has running."""
        with self.store.begin() as connection:
            mine = JOBS.c.batch_id == row["id"]
            over = {"status": "cancelled", "completed_at": self.store.clock()}
            connection.execute(sa.update(JOBS).where(mine, JOBS.c.status == "queued").values(over))
            connection.execute(sa.update(JOBS).where(mine, JOBS.c.status == "in_progress").values(cancel=True))

    def finalize(self, row: Row, status: str, most_bytes: int, errors: list[dict[str, Any]] | None = None) -> None:
        """Write what became of a batch's lines into its files, and end it. `errors` are the batch's own."""
        now = self.store.clock()
        with self.store.begin() as connection:
            update = sa.update(BATCHES).where(BATCHES.c.id == row["id"], BATCHES.c.finalizing_at.is_(None))
            values = {"finalizing_at": now} | ({"status": "finalizing"} if status == "completed" else {})
            connection.execute(update.values(values))
        counts = self.counts(row)
        known = row["line"] if status == "failed" else counts["total"]  # without its input, nobody knows the others
        outputs = {
            new_id("file"): self._outputs(row) if counts["completed"] else None,
            new_id("file"): self._errors(row, status, most_bytes) if counts["completed"] < known else None,
        }
        output_id, error_id = (file_id if chunks is not None else None for file_id, chunks in outputs.items())

        def record(connection: sa.Connection, sizes: dict[str, int]) -> None:
            for file_id, name in ((output_id, "output"), (error_id, "error")):
                if file_id is not None:
                    filename = f"{row['id']}_{name}.jsonl"
                    values = described(
                        file_id, row["owner"], "batch_output", filename, sizes[file_id], now, self.keep_seconds
                    )
                    connection.execute(sa.insert(FILES).values(values))
            ended = {"status": status, "ended_at": self.store.clock(), "output_file_id": output_id}
            ended |= {"error_file_id": error_id, "completed": counts["completed"], "failed": counts["failed"]}
            ended |= {} if errors is None else {"errors": errors}
            mine = (
                BATCHES.c.id == row["id"],
                BATCHES.c.ended_at.is_(None),
                BATCHES.c.lease_owner == row["lease_owner"],
            )
            if not connection.execute(sa.update(BATCHES).where(*mine).values(ended)).rowcount:
                raise StoreFailed(f"batch {row['id']} is another server's meanwhile")

        written = {file_id: chunks for file_id, chunks in outputs.items() if chunks is not None}
        self.store.write(written, CONTENT, record)
        mine = sa.select(JOBS.c.id).where(JOBS.c.batch_id == row["id"]).limit(PAGE)
        while ids := [job["id"] for job in self.store.rows(mine)]:
            self.store.forget(ids, sa.delete(JOBS).where(JOBS.c.id.in_(ids)))

    def _jobs(self, row: Row, *statuses: str) -> Iterator[Row]:
        """A batch's jobs by line, some at a time; keeps the lease while they are read."""
        line = -1
        while True:
            where = (JOBS.c.batch_id == row["id"], JOBS.c.line > line, JOBS.c.status.in_(statuses))
            rows = self.store.rows(sa.select(JOBS).where(*where).order_by(JOBS.c.line).limit(CREATED_PAGE))
            if not rows:
                return
            yield from rows
            line = rows[-1]["line"]
            self._update(row, {"lease_until": self.store.clock() + LEASE_SECONDS}, *ACTIVE)

    def _outputs(self, row: Row) -> Iterator[bytes]:
        for job in self._jobs(row, "completed"):
            body = {**job["result"], "id": job["id"], "model": job["body"]["model"]}
            body["created"] = int(job["completed_at"])
            body["size"] = f"{body['width']}x{body['height']}"
            try:
                body["data"] = [
                    {"b64_json": self._picture(job["id"], i), "seed": seed} for i, seed in enumerate(body.pop("seeds"))
                ]
            except FileGone as lost:
                yield answered(job["id"], job["custom_id"], lost.status, body_of(lost))
                continue
            yield answered(job["id"], job["custom_id"], 200, body)

    def _picture(self, job_id: str, index: int) -> str:
        return base64.b64encode(b"".join(self.store.read(job_id, f"picture-{index}"))).decode()

    def _errors(self, row: Row, status: str, most_bytes: int) -> Iterator[bytes]:
        """Lines that failed, and those that the end of the batch has cut off."""
        cut = {"code": f"batch_{status}", "message": f"the batch is {status}: this line was not done"}
        for job in self._jobs(row, "failed", "cancelled"):
            if job["status"] == "failed":
                wrong = {name: job["error"][name] for name in ("message", "type", "param", "code")}
                yield answered(job["id"], job["custom_id"], job["error"]["status"], {"error": wrong})
            else:
                yield answered(job["id"], job["custom_id"], None, cut)
        if row["line"] < row["total"] and status != "failed":
            chunks = self.store.read(row["input_file_id"], CONTENT, row["offset"])
            for number, (_, line) in enumerate(lines(chunks, most_bytes)):
                yield answered(f"{row['id']}-{row['line'] + number}", json.loads(line)["custom_id"], None, cut)


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
