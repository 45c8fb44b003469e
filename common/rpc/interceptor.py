"""Stands before every handler of a server: counts calls, refuses them while draining, answers errors."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, TypeAlias

import grpc

from common.errors import FleetError, InternalError, Unavailable
from common.rpc.status import abort_with

log = logging.getLogger(__name__)

_HEAR_OUT_SECONDS = 5.0

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class CallGate(grpc.aio.ServerInterceptor):
    """Turns what handlers raise into statuses, and knows when the last call has ended.

    A FleetError is answered as it is. Anything else is a defect: logged with its traceback, answered as INTERNAL with
    its type and text; the process goes on. Health checks and reflection pass by.
    """

    def __init__(self) -> None:
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
        """Wrap the handler of a fleet method."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/fleet."):
            return handler
        return self._wrapped(handler, handler_call_details.method)

    def _wrapped(self, handler: Handler, method: str) -> Handler:
        kinds = {
            (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
            (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
            (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
            (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
        }
        make, behavior = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
        wrap = self._generator if inspect.isasyncgenfunction(behavior) else self._coroutine
        return make(
            wrap(behavior, method, bool(handler.request_streaming)),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _coroutine(self, behavior: Any, method: str, streams: bool) -> Any:
        async def gated(request: Any, context: Context) -> Any:
            async with self._call(context, method, streams):
                return await behavior(request, context)

        return gated

    def _generator(self, behavior: Any, method: str, streams: bool) -> Any:
        async def gated(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self._call(context, method, streams), aclosing(behavior(request, context)) as responses:
                async for response in responses:
                    yield response

        return gated

    @asynccontextmanager
    async def _call(self, context: Context, method: str, streams: bool) -> AsyncIterator[None]:
        self._in_flight += 1
        self._idle.clear()
        try:
            if self._draining:
                raise Unavailable("this process is shutting down")
            yield
        except FleetError as error:
            if isinstance(error, InternalError):
                log.error("%s: %s", method, error.message, exc_info=error)
            await _hear_out(context, streams)
            await abort_with(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            log.exception("%s failed", method)
            await _hear_out(context, streams)
            await abort_with(context, InternalError(f"{type(error).__name__}: {error}"))
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()


async def _hear_out(context: Context, streams: bool) -> None:
    """Let a caller that still sends finish, within limits: grpc's asyncio clients lose the status of a call that ends
    while they write (grpc issue 36066), and would take a wrong input for a broken connection.
    """
    if not streams:
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(_HEAR_OUT_SECONDS):
            while await context.read() is not grpc.aio.EOF:
                pass
