"""Every error that a client can be answered with: one tree, a status each, turned into HTTP in `app.http.problems`."""

from __future__ import annotations

import re
from typing import ClassVar

from models.errors import RequestError, cut

MESSAGE_CHARACTERS = 1000


class ServiceError(Exception):
    """Base of the tree. `param` names the field at fault, `retry_after` is in seconds.

    `outcome` is the label under which requests that end so are counted, `kind` the error's `type` on the wire. What a
    client wrote is cut where it is quoted; `MESSAGE_CHARACTERS` bounds what was forgotten.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    outcome: ClassVar[str] = "error"
    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = cut(message, MESSAGE_CHARACTERS)
        self.param = None if param is None else cut(param)
        self.retry_after = retry_after


class Malformed(ServiceError):
    """The body is not what the route takes at all: no JSON, no form."""

    status, kind, outcome, code = 400, "invalid_request_error", "invalid", "malformed"


class Unauthorized(ServiceError):
    """No key, or none of ours."""

    status, kind, outcome, code = 401, "authentication_error", "unauthorized", "invalid_api_key"


class AdminOnly(ServiceError):
    """Only whoever has the admin key may do this."""

    status, kind, outcome, code = 403, "permission_error", "unauthorized", "admin_only"


class NotFound(ServiceError):
    """No such route, or no such model."""

    status, kind, outcome, code = 404, "not_found_error", "invalid", "not_found"


class ModelNotFound(NotFound):
    """The model that was asked for is not served here."""

    code = "model_not_found"


class StoreOff(NotFound):
    """The server runs without a store, so it has no jobs, files or batches."""

    code = "store_off"


class MethodNotAllowed(ServiceError):
    """The route exists, but not for this method."""

    status, kind, outcome, code = 405, "invalid_request_error", "invalid", "method_not_allowed"


class Conflict(ServiceError):
    """Not in the state that this asks for: a picture of a job that is not done, say."""

    status, kind, outcome, code = 409, "conflict_error", "invalid", "conflict"


class IdempotencyConflict(Conflict):
    """The same `Idempotency-Key` was sent with another body."""

    code = "idempotency_conflict"


class RequestTimeout(ServiceError):
    """The head or the body of a request came too slowly."""

    status, kind, outcome, code = 408, "invalid_request_error", "invalid", "request_timeout"


class UnsupportedEncoding(ServiceError):
    """The body is packed in a way that is not taken."""

    status, kind, outcome, code = 415, "invalid_request_error", "invalid", "unsupported_encoding"


class TooLarge(ServiceError):
    """The body is larger than `max_body_bytes`."""

    status, kind, outcome, code = 413, "invalid_request_error", "invalid", "body_too_large"


class Impossible(ServiceError):
    """Well-formed, but not possible: `param` names the field."""

    status, kind, outcome, code = 422, "invalid_request_error", "invalid", "invalid_value"

    @classmethod
    def of(cls, error: RequestError) -> Impossible:
        """The library's refusal, under its own name in snake case."""
        wrapped = cls(str(error), param=error.field)
        wrapped.code = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
        return wrapped


class QueueFull(ServiceError):
    """As many requests wait as may, or as many bytes of them."""

    status, kind, outcome, code = 429, "rate_limit_error", "rejected", "queue_full"


class ClientGone(ServiceError):
    """The client left before its answer; only logs and metrics ever see this."""

    status, kind, outcome, code = 499, "client_error", "cancelled", "client_gone"


class Internal(ServiceError):
    """Something that should not have happened; the log has the details, the client has the request id."""


class ForwardFailed(ServiceError):
    """The model raised while computing this request's tick."""

    code = "forward_failed"


class OutOfMemory(ServiceError):
    """The device has not enough memory even for this request alone."""

    code = "out_of_memory"


class NonFinite(ServiceError):
    """The request's latents ended in NaN or infinity."""

    code = "non_finite"


class Unavailable(ServiceError):
    """Not now; `retry_after` says when to come back."""

    status, outcome = 503, "rejected"


class Loading(Unavailable):
    """The models are still being loaded."""

    code = "loading"


class Draining(Unavailable):
    """The server is shutting down and takes no new work."""

    code = "draining"


class Overloaded(Unavailable):
    """As many connections, or bytes of bodies, as may be."""

    code = "overloaded"


class EngineDead(Unavailable):
    """The engine thread has died; nothing will be generated until the process is started anew."""

    code = "engine_dead"


class DeadlineExceeded(ServiceError):
    """The request's deadline passed before its images were done."""

    status, kind, outcome, code = 504, "timeout_error", "deadline", "deadline_exceeded"


class ModelChanged(ServiceError):
    """The model or adapter is not the one that the job was accepted for: its picture would be another."""

    code = "model_changed"


class JobCrashed(ServiceError):
    """The process ended three times while it ran this job."""

    code = "job_crashed"


class StoreFailed(ServiceError):
    """The store could not be read or written."""

    code = "store_failed"


class FileGone(StoreFailed):
    """A file of the store is not there any more."""


class StoreUnavailable(Unavailable):
    """The store is locked or cannot be reached."""

    code = "store_unavailable"


class StoreFull(ServiceError):
    """No room in the store: its disk is full, or as much as `store_bytes` is kept. Nothing was written."""

    status, kind, outcome, code = 507, "server_error", "rejected", "store_full"
