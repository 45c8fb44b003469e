"""Errors that callers receive, independent of the transport.

The module common.rpc.status converts them to gRPC status codes and back.

FleetError
├── InvalidInput          a value is invalid               INVALID_ARGUMENT
├── NotFound              the resource does not exist      NOT_FOUND
├── FailedPrecondition    the state forbids the call       FAILED_PRECONDITION
│   └── CheckpointError   the checkpoint is invalid
├── ResourceExhausted     a limit is reached               RESOURCE_EXHAUSTED
├── Unavailable           temporary; retry                 UNAVAILABLE
│   └── HandedOver        another worker resumes the call
├── Cancelled             the request was cancelled        CANCELLED
├── DeadlineExceeded      the deadline has passed          DEADLINE_EXCEEDED
├── Aborted               a concurrent write succeeded     ABORTED
├── Unauthenticated       no valid credentials             UNAUTHENTICATED
├── PermissionDenied      the caller is not authorized     PERMISSION_DENIED
└── InternalError         a defect of the fleet            INTERNAL
"""

from __future__ import annotations


class FleetError(Exception):
    """Error with a message of one sentence for the caller: `FIELD: VALUE is not RULE; RULE that works`.

    `field` is the name of the parameter that the error is about; empty if there is none.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidInput(FleetError):
    """A value that the caller sent is invalid."""


class NotFound(FleetError):
    """The resource that the caller named does not exist."""


class FailedPrecondition(FleetError):
    """The current state does not permit the call."""


class CheckpointError(FailedPrecondition):
    """A checkpoint directory is incomplete or unreadable."""


class ResourceExhausted(FleetError):
    """A limit is reached. `retry_seconds` is the estimated delay until a retry succeeds; None if it is unknown."""

    def __init__(self, message: str, *, field: str = "", retry_seconds: float | None = None) -> None:
        super().__init__(message, field=field)
        self.retry_seconds = retry_seconds


class Unavailable(FleetError):
    """No process can handle the call now. The caller should retry."""


class HandedOver(Unavailable):
    """A draining worker ended the call, at a step boundary or before its stages started.

    Another worker runs the call, from the latest step checkpoint if there is one.
    """


class Cancelled(FleetError):
    """The request was cancelled."""


class DeadlineExceeded(FleetError):
    """The deadline of the request has passed."""


class Aborted(FleetError):
    """A concurrent process has already changed the state."""


class Unauthenticated(FleetError):
    """The caller has sent no valid credentials."""


class PermissionDenied(FleetError):
    """The caller is authenticated, but not authorized."""


class InternalError(FleetError):
    """A defect of the fleet."""
