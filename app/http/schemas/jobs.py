"""The bodies of jobs: what is asked for, and how a job is shown."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from app.http.schemas.requests import EXAMPLE, GenerationFields, GenerationRequest, Text
from app.http.schemas.responses import ErrorDetail, TimingBody, UsageBody

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


def _off(value: int) -> int:
    if value:
        raise ValueError("is not for jobs: follow its events")
    return value


class JobRequest(GenerationFields):
    """The body of POST /v1/images/jobs: a body of /generate, and how the job is to be treated."""

    model_config = ConfigDict(json_schema_extra={"examples": [{**EXAMPLE, "priority": "batch"}]})

    stream: Annotated[bool, AfterValidator(_off)] = Field(False, description="Not for jobs, which have events.")
    partial_images: Annotated[int, AfterValidator(_off)] = Field(0, description="Not for jobs.")
    priority: Literal["interactive", "batch"] = Field(
        "interactive", description="batch: jobs that come up to ten minutes later may go first."
    )
    webhook_url: Text | None = Field(
        None, max_length=2048, description="Told when the job is over; only where the operator has listed its origin."
    )

    def plain(self) -> GenerationRequest:
        """The same request as /generate takes it."""
        fields = self.model_dump(include=self.model_fields_set & set(GenerationFields.model_fields), round_trip=True)
        fields |= {"acceleration": self.acceleration} if self.acceleration is not None else {}
        return GenerationRequest.model_validate(fields)


class JobImage(BaseModel):
    """One picture of a finished job."""

    index: int
    seed: int
    url: str = Field(description="Where it is, on this server.")


class JobBody(BaseModel):
    """A job."""

    id: str
    object: Literal["image.job"] = "image.job"
    status: Status
    progress: int = Field(description="Percent.")
    position: int | None = Field(description="Jobs that go before it, while it is queued.")
    priority: str
    model: str
    seed: int
    created_at: int = Field(description="Unix time.")
    started_at: int | None
    completed_at: int | None
    expires_at: int | None = Field(description="When it is forgotten, at the latest.")
    error: ErrorDetail | None
    usage: UsageBody | None
    timing: TimingBody | None
    acceleration: list[dict[str, Any]] = Field(description="As asked for; of a finished job as run.")
    images: list[JobImage]
    output_format: str
    request: dict[str, Any] = Field(description="The body as resolved: a body of /generate that makes it again.")
    has_image: bool = Field(description="Whether it started from a picture, which `request` does not have.")


class JobsBody(BaseModel):
    """The answer of GET /v1/images/jobs."""

    object: Literal["list"] = "list"
    data: list[JobBody]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedBody(BaseModel):
    """The answer of a DELETE."""

    id: str
    object: str
    deleted: bool = True


FIELD_NAMES = frozenset({*JobRequest.model_fields, "limit", "after", "status", "index", "job_id", "Idempotency-Key"})
"""Names of these routes that an error may be about."""
