"""Errors to gRPC statuses and back: mirror images, so that an error is the same on both sides of a call.

Trailing metadata completes the status: `fleet-error` is the name of the error's class, `fleet-error-field` the
parameter it is about, percent-encoded, `retry-after-ms` how long to wait before the next try. A status without
`fleet-error` was made by gRPC itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn, cast
from urllib.parse import quote, unquote

import grpc

from common import errors
from common.errors import FleetError

KIND_KEY = "fleet-error"
FIELD_KEY = "fleet-error-field"
RETRY_KEY = "retry-after-ms"
# Each byte takes up to three in a header: headers of 16 KiB are refused, with the call's status.
MAX_MESSAGE = 2_048
"""Longest message of an error or a warning; bytes of UTF-8 in a status, characters in a record."""
MAX_FIELD = 256
"""Longest name of the field that an error or a warning is about, likewise."""

_CODES: dict[type[FleetError], grpc.StatusCode] = {
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.CheckpointError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.HandedOver: grpc.StatusCode.UNAVAILABLE,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}
_KINDS = {kind.__name__: kind for kind in _CODES}
# What a status means that gRPC made itself. Its INTERNAL, UNKNOWN and CANCELLED are broken or closed connections.
_TRANSPORT: dict[grpc.StatusCode, type[FleetError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidInput,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    grpc.StatusCode.UNIMPLEMENTED: errors.FailedPrecondition,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.ABORTED: errors.Aborted,
    grpc.StatusCode.ALREADY_EXISTS: errors.Aborted,
    grpc.StatusCode.DATA_LOSS: errors.InternalError,
}


class Status(NamedTuple):
    """A gRPC status with the trailing metadata that completes it."""

    code: grpc.StatusCode
    details: str
    metadata: tuple[tuple[str, str], ...]


def to_status(error: FleetError) -> Status:
    """The status of an error; of a subclass that is not listed, that of its nearest listed ancestor."""
    kind = next((cls for cls in type(error).__mro__ if cls in _CODES), errors.InternalError)
    metadata: tuple[tuple[str, str], ...] = ((KIND_KEY, kind.__name__),)
    if error.field:
        metadata += ((FIELD_KEY, quote(_sound(error.field, MAX_FIELD), safe="[]")),)
    if isinstance(error, errors.ResourceExhausted) and error.retry_seconds is not None:
        metadata += ((RETRY_KEY, str(math.ceil(error.retry_seconds * 1_000))),)
    return Status(_CODES[kind], _sound(error.message, MAX_MESSAGE), metadata)


def from_status(code: grpc.StatusCode, details: str, metadata: Iterable[tuple[str, Any]]) -> FleetError:
    """The error of a status."""
    trailing = {key: value for key, value in metadata if isinstance(value, str)}
    kind = _KINDS.get(trailing.get(KIND_KEY, ""))
    if kind is None:
        kind = _TRANSPORT.get(code, errors.Unavailable)
        details = details or code.name
    field = unquote(trailing.get(FIELD_KEY, ""))
    delay = trailing.get(RETRY_KEY, "")
    if kind is errors.ResourceExhausted and delay.isascii() and delay.isdigit():
        return errors.ResourceExhausted(details, field=field, retry_seconds=int(delay[:12]) / 1_000)
    return kind(details, field=field)


def from_rpc_error(error: grpc.RpcError) -> FleetError:
    """The error that a call ended with, from grpc's asyncio or its blocking API."""
    call = cast(Any, error)
    return from_status(call.code(), call.details() or "", call.trailing_metadata() or ())


def is_sent_by_peer(error: grpc.RpcError) -> bool:
    """Whether the other side sent this status, rather than gRPC having made it."""
    return any(key == KIND_KEY for key, _ in cast(Any, error).trailing_metadata() or ())


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: FleetError) -> NoReturn:
    """End a call with an error's status. Raises grpc.aio.AbortError, which handlers let pass.

    Trailing metadata that the handler has set are sent too.
    """
    code, details, metadata = to_status(error)
    await context.abort(code, details, (*(context.trailing_metadata() or ()), *metadata))
    raise AssertionError("abort returned")


def _sound(text: str, most: int) -> str:
    """At most so many bytes of text that UTF-8 can encode: a caller may have sent lone surrogates."""
    return text[:most].encode("utf-8", "backslashreplace")[:most].decode("utf-8", "ignore")
