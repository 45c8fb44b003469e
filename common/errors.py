"""Errors that callers see. Transport-free; common.rpc.status maps each to its gRPC status code and back.

FleetError
├── InvalidInput          a value is wrong            INVALID_ARGUMENT
├── NotFound              no such thing               NOT_FOUND
├── FailedPrecondition    not in this state           FAILED_PRECONDITION
│   └── CheckpointError   the checkpoint is unusable
├── ResourceExhausted     a bound is reached          RESOURCE_EXHAUSTED
├── Unavailable           nobody can do it now        UNAVAILABLE
│   └── HandedOver        another worker goes on
├── Cancelled             somebody asked for it       CANCELLED
├── DeadlineExceeded      too late                    DEADLINE_EXCEEDED
├── Aborted               somebody else was first     ABORTED
├── Unauthenticated       who is calling?             UNAUTHENTICATED
├── PermissionDenied      not for this caller         PERMISSION_DENIED
└── InternalError         a defect                    INTERNAL
"""

from __future__ import annotations


class FleetError(Exception):
    """Something a caller is told, in one sentence that says what is wrong and what would be right."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidInput(FleetError):
    """A value that the caller sent is wrong; `field` names it."""


class NotFound(FleetError):
    """What the caller named does not exist."""


class FailedPrecondition(FleetError):
    """The call does not fit the state that things are in."""


class CheckpointError(FailedPrecondition):
    """A checkpoint directory is missing something, or holds something unreadable."""


class ResourceExhausted(FleetError):
    """A bound of the fleet is reached; later it may work: after `retry_seconds`, where that can be told."""

    def __init__(self, message: str, *, field: str = "", retry_seconds: float | None = None) -> None:
        super().__init__(message, field=field)
        self.retry_seconds = retry_seconds


class Unavailable(FleetError):
    """No process can take the call now; trying again is right."""


class HandedOver(Unavailable):
    """The worker leaves and has ended the call at a step boundary; another worker goes on from its checkpoint."""


class Cancelled(FleetError):
    """Somebody asked for the request to end."""


class DeadlineExceeded(FleetError):
    """The request's deadline passed."""


class Aborted(FleetError):
    """Another process got there first."""


class Unauthenticated(FleetError):
    """The caller has not shown who it is, or not credibly."""


class PermissionDenied(FleetError):
    """The caller is known, and may not do that."""


class InternalError(FleetError):
    """A defect of ours."""
