"""What became of a batch's lines: its output and error files, written as streams, and its end."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from app.errors import FileGone, StoreFailed
from app.http.problems import body as body_of
from app.jobs.batches import Batches
from app.jobs.files import CONTENT, described
from app.jobs.lines import answered, lines
from app.jobs.store import PAGE, Row, new_id
from app.jobs.tables import BATCHES, FILES, JOBS

READ_PAGE = 20


class Outcome:
    """Ends batches. Any thread may call."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.store = batches.store

    def finalize(self, row: Row, status: str, most_bytes: int, errors: list[dict[str, Any]] | None = None) -> None:
        """Write what became of a batch's lines into its files, and end it. `errors` are the batch's own."""
        now = self.store.clock()
        with self.store.begin() as connection:
            update = sa.update(BATCHES).where(BATCHES.c.id == row["id"], BATCHES.c.finalizing_at.is_(None))
            values = {"finalizing_at": now} | ({"status": "finalizing"} if status == "completed" else {})
            connection.execute(update.values(values))
        counts = self.batches.counts(row)
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
                        file_id, row["owner"], "batch_output", filename, sizes[file_id], now, self.batches.keep_seconds
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
            rows = self.store.rows(sa.select(JOBS).where(*where).order_by(JOBS.c.line).limit(READ_PAGE))
            if not rows:
                return
            yield from rows
            line = rows[-1]["line"]
            self.batches.keep(row)

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
