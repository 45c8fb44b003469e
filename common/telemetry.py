"""Prometheus endpoint of a process, and instrumentation of calls and stages. Does not import torch.

Only RPCs of the fleet are measured. Health checks, which are much more frequent, and reflection are not.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar
from wsgiref.simple_server import WSGIServer

import grpc
from prometheus_client import start_http_server

from common.errors import FailedPrecondition, InvalidInput
from common.logs import get_logger
from common.metrics import STAGE_SECONDS, observe
from common.rpc.call_metrics import Sizes, counted_handler, served_call
from common.rpc.wrapping import Context, Handler, wrap_handler

P = ParamSpec("P")
T = TypeVar("T")

_log = get_logger(__name__)


@contextmanager
def stage_timer(service: str, model: str, stage: str) -> Iterator[None]:
    """Observe the duration of a stage, including failed runs."""
    started = time.perf_counter()
    try:
        yield
    finally:
        observe(STAGE_SECONDS.labels(service, model, stage), time.perf_counter() - started)


def in_current_context(work: Callable[P, T]) -> Callable[P, T]:
    """Return the function, bound to a copy of the current context variables, for use on another thread."""
    return partial(copy_context().run, work)


@dataclass(frozen=True)
class MetricsServer:
    """The HTTP endpoint that Prometheus scrapes."""

    port: int
    _server: WSGIServer
    _thread: threading.Thread

    def stop(self) -> None:
        """Stop the endpoint and its thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_metrics(port: int, address: str = "0.0.0.0") -> MetricsServer:
    """Serve all metrics of this process over HTTP, with exemplars in OpenMetrics format. Port 0 selects a free port.

    Raises InvalidInput for an invalid port number, and FailedPrecondition if the port cannot be bound.
    """
    try:
        server, thread = start_http_server(port, address)
    except OverflowError:
        raise InvalidInput(f"metrics_port: {port} is not from 0 to 65535; 9090 works", field="metrics_port") from None
    except OSError as error:
        message = f"metrics_port: {port} cannot be bound: {error.strerror}; choose a free port"
        raise FailedPrecondition(message, field="metrics_port") from error
    _log.info("metrics endpoint started", port=server.server_port)
    return MetricsServer(server.server_port, server, thread)


class MetricsInterceptor(grpc.aio.ServerInterceptor):
    """Counts and times calls of the fleet's RPCs."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handlers of the fleet's methods; return other handlers unchanged."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.lstrip("/")
        if handler is None or not method.startswith("fleet."):
            return handler
        sizes = Sizes()
        call = _MeasuredCall(method, sizes)
        return wrap_handler(counted_handler(handler, sizes), call.measure)


@dataclass(frozen=True)
class _MeasuredCall:
    method: str
    sizes: Sizes

    @asynccontextmanager
    async def measure(self, context: Context) -> AsyncIterator[None]:
        with served_call(self.method, self.sizes) as set_status:
            try:
                yield
                set_status(_code(context, "OK"))
            except (asyncio.CancelledError, GeneratorExit):
                set_status("CANCELLED")
                raise
            except grpc.aio.AbortError:
                set_status(_code(context, "UNKNOWN"))
                raise


def _code(context: Context, unset: str) -> str:
    """Return the name of the status that the handler set, or `unset`. The context may contain 0, None or a number."""
    code: Any = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    names = {status.value[0]: status.name for status in grpc.StatusCode}
    return names[code] if code else unset
