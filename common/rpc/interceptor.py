"""Server interceptor: counts calls, refuses calls while draining, converts exceptions to statuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import grpc
from google.protobuf.message import DecodeError

from common.errors import DeadlineExceeded, FleetError, InternalError, InvalidInput, ResourceExhausted, Unavailable
from common.logs import get_logger
from common.rpc.options import ServerLimits
from common.rpc.status import abort_with
from common.rpc.wrapping import Context, Handler, waiting_for_request, wrap_handler
from common.trace_context import receive

_log = get_logger(__name__)

_READ_REST_SECONDS = 5.0
_MAX_AUXILIARY = 1_024  # concurrent health checks and reflection calls; health watches do not end by themselves
_REFLECTION_SECONDS = 60.0

Admit = Callable[[Context], None]
"""Authorizes the caller. Raises FleetError to refuse the call. May set context variables for the handler."""


def admit_all(_: Context) -> None:
    """Authorize every caller."""


class CallGate(grpc.aio.ServerInterceptor):
    """Converts exceptions of handlers to gRPC statuses, and limits and counts the calls in flight.

    A FleetError is returned as its status. Any other exception is a defect: it is logged with its traceback and
    returned as INTERNAL with its type and message. `admit` authorizes callers, and `limits` bounds concurrent calls;
    both apply before the request is read. Reading a unary request has a timeout. Health checks and reflection need no
    authorization and have a separate limit, so that neither kind of call can exhaust the limit of the other.
    """

    def __init__(self, admit: Admit = admit_all, limits: ServerLimits | None = None) -> None:
        self._admit = admit
        self._limits = limits or ServerLimits()
        self._auxiliary = 0
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def in_flight(self) -> int:
        """Number of calls in flight."""
        return self._in_flight

    @property
    def closed(self) -> bool:
        """Whether new calls are refused."""
        return self._draining

    def close(self) -> None:
        """Refuse new calls with UNAVAILABLE. Calls in flight continue."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Wait until no call is in flight."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of a method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method, streams = handler_call_details.method, bool(handler.request_streaming)
        handler = waiting_for_request(handler, self._limits.request_seconds)
        if method.startswith("/fleet."):
            return wrap_handler(handler, lambda context: self._call(context, method, streams))
        return wrap_handler(handler, lambda context: self._auxiliary_call(context, streams))

    @asynccontextmanager
    async def _call(self, context: Context, method: str, streams: bool) -> AsyncIterator[None]:
        self._in_flight += 1
        self._idle.clear()
        try:
            if self._draining:
                raise Unavailable("this process is shutting down")
            if self._in_flight > self._limits.calls:
                raise ResourceExhausted(f"this process serves its maximum of {self._limits.calls} concurrent calls")
            self._admit(context)
            receive(context.invocation_metadata())
            yield
        except FleetError as error:
            if isinstance(error, InternalError):
                _log.error("call failed", method=method, error=error.message, exc_info=error)
            await _read_rest(context, streams)
            await abort_with(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 -- It is logged with its traceback.
            _log.exception("call failed with an unexpected exception", method=method)
            await _read_rest(context, streams)
            await abort_with(context, InternalError(f"{type(error).__name__}: {error}"))
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    @asynccontextmanager
    async def _auxiliary_call(self, context: Context, streams: bool) -> AsyncIterator[None]:
        self._auxiliary += 1
        try:
            if self._auxiliary > _MAX_AUXILIARY:
                message = f"this process serves its maximum of {_MAX_AUXILIARY} health checks and reflection calls"
                raise ResourceExhausted(message)
            async with _ended_after(_REFLECTION_SECONDS if streams else None):
                yield
        except FleetError as error:
            await abort_with(context, error)
        except DecodeError:
            await _read_rest(context, streams)
            await abort_with(context, InvalidInput("the bytes are not a request of this method"))
        finally:
            self._auxiliary -= 1


@asynccontextmanager
async def _ended_after(seconds: float | None) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineExceeded(f"the call took longer than {seconds:g} s") from None


async def _read_rest(context: Context, streams: bool) -> None:
    """Read the rest of a request stream before the call ends with an error.

    Reads for at most _READ_REST_SECONDS. grpc's asyncio clients lose the status of a call that ends while they write
    (grpc issue 36066), and would report a connection error instead of an invalid input.
    """
    if not streams:
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(_READ_REST_SECONDS):
            while await _read_message(context):
                pass


async def _read_message(context: Context) -> bool:
    """Read one message, valid or not. Returns False at the end of the stream."""
    try:
        return await context.read() is not grpc.aio.EOF
    except DecodeError:
        return True
