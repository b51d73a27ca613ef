"""The bodies of /v1/files and /v1/batches, as OpenAI's SDK reads and writes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.http.schemas.requests import Text

Endpoint = Literal["/v1/images/generations", "/v1/images/edits"]
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]


class FileBody(BaseModel):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int = Field(description="Unix time.")
    expires_at: int | None
    filename: str
    purpose: str = Field(description="batch, or batch_output.")
    status: Literal["processed"] = "processed"


class FilesBody(BaseModel):
    """The answer of GET /v1/files."""

    object: Literal["list"] = "list"
    data: list[FileBody]
    first_id: str | None
    last_id: str | None
    has_more: bool


Key = Annotated[Text, Field(min_length=1, max_length=64)]
Value = Annotated[Text, Field(max_length=512)]


class BatchRequest(BaseModel):
    """The body of POST /v1/batches."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {"input_file_id": "file-1", "endpoint": "/v1/images/generations", "completion_window": "24h"},
            ]
        },
    )

    input_file_id: Text = Field(max_length=64, description="A file of purpose batch.")
    endpoint: Endpoint = Field(description="What every line asks.")
    completion_window: str = Field(pattern=r"^([1-9]|[1-9]\d|1[0-5]\d|16[0-8])h$", description="1h to 168h.")
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = Field(None, description="Kept with it.")


class BatchError(BaseModel):
    """What is wrong with a line of the input file, or with the file."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(BaseModel):
    """All that is wrong, the first hundred."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class Counts(BaseModel):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int


class BatchBody(BaseModel):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: Endpoint
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, row: Any, counts: dict[str, int]) -> BatchBody:
        """A batch as it is kept, and the counts of its lines."""
        named = ("id", "endpoint", "input_file_id", "completion_window", "status", "output_file_id", "error_file_id")
        moments = ("created_at", "in_progress_at", "expires_at", "finalizing_at", "cancelling_at")
        ended: dict[str, int | None] = {
            f"{status}_at": None for status in ("completed", "failed", "expired", "cancelled")
        }
        if row["ended_at"] is not None:
            ended[f"{row['status']}_at"] = int(row["ended_at"])
        return cls.model_validate(
            {name: row[name] for name in named}
            | {name: None if row[name] is None else int(row[name]) for name in moments}
            | ended
            | {"errors": None if row["errors"] is None else {"data": row["errors"]}}
            | {"request_counts": counts, "metadata": row["attributes"]}
        )


class BatchesBody(BaseModel):
    """The answer of GET /v1/batches."""

    object: Literal["list"] = "list"
    data: list[BatchBody]
    first_id: str | None
    last_id: str | None
    has_more: bool


FIELD_NAMES = frozenset({*BatchRequest.model_fields, "file_id", "batch_id", "purpose", "order", "file"})
"""Names of these routes that an error may be about."""
