"""Stands before every handler of a server: counts calls, refuses them while draining, answers errors."""

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

_HEAR_OUT_SECONDS = 5.0
_MAX_ASIDE = 1_024  # health checks and reflection, of which watches of health go on for as long as their caller likes
_REFLECTION_SECONDS = 60.0

Admit = Callable[[Context], None]
"""Looks at who calls. Raises FleetError to refuse; what it sets in context variables, the handler sees."""


def admit_all(_: Context) -> None:
    """Refuse nobody."""


class CallGate(grpc.aio.ServerInterceptor):
    """Turns what handlers raise into statuses, and knows when the last call has ended.

    A FleetError is answered as it is. Anything else is a defect: logged with its traceback, answered as INTERNAL with
    its type and text; the process goes on. `admit` decides who is served, `limits` how many at a time. A request is
    read after that, and waited for so long only. Health checks and reflection are for everybody: they are counted for
    themselves, so that neither crowds the other out.
    """

    def __init__(self, admit: Admit = admit_all, limits: ServerLimits | None = None) -> None:
        self._admit = admit
        self._limits = limits or ServerLimits()
        self._aside = 0
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def in_flight(self) -> int:
        """Calls being served."""
        return self._in_flight

    @property
    def closed(self) -> bool:
        """Whether new calls are refused."""
        return self._draining

    def close(self) -> None:
        """From now on new calls get UNAVAILABLE; those in flight go on."""
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
        return wrap_handler(handler, lambda context: self._call_aside(context, streams))

    @asynccontextmanager
    async def _call(self, context: Context, method: str, streams: bool) -> AsyncIterator[None]:
        self._in_flight += 1
        self._idle.clear()
        try:
            if self._draining:
                raise Unavailable("this process is shutting down")
            if self._in_flight > self._limits.calls:
                raise ResourceExhausted(f"this process serves {self._limits.calls} calls at a time and has as many")
            self._admit(context)
            receive(context.invocation_metadata())
            yield
        except FleetError as error:
            if isinstance(error, InternalError):
                _log.error("call failed", method=method, error=error.message, exc_info=error)
            await _hear_out(context, streams)
            await abort_with(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 -- It is logged with its traceback.
            _log.exception("call failed by a defect", method=method)
            await _hear_out(context, streams)
            await abort_with(context, InternalError(f"{type(error).__name__}: {error}"))
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    @asynccontextmanager
    async def _call_aside(self, context: Context, streams: bool) -> AsyncIterator[None]:
        self._aside += 1
        try:
            if self._aside > _MAX_ASIDE:
                raise ResourceExhausted(f"{_MAX_ASIDE} health checks and reflections are under way")
            async with _ended_after(_REFLECTION_SECONDS if streams else None):
                yield
        except FleetError as error:
            await abort_with(context, error)
        except DecodeError:
            await _hear_out(context, streams)
            await abort_with(context, InvalidInput("the bytes are not a request of this method"))
        finally:
            self._aside -= 1


@asynccontextmanager
async def _ended_after(seconds: float | None) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineExceeded(f"the call took longer than {seconds:g} s") from None


async def _hear_out(context: Context, streams: bool) -> None:
    """Let a caller that still sends finish, within limits: grpc's asyncio clients lose the status of a call that ends
    while they write (grpc issue 36066), and would take a wrong input for a broken connection.
    """
    if not streams:
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(_HEAR_OUT_SECONDS):
            while await _reads_on(context):
                pass


async def _reads_on(context: Context) -> bool:
    """Whether something came, right or wrong."""
    try:
        return await context.read() is not grpc.aio.EOF
    except DecodeError:
        return True
