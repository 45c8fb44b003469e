"""What an operator sees of a process: log lines that name their request, and its endpoint of metrics.

Free of torch. Only the fleet's own RPCs are measured: health checks and reflection would drown them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, ParamSpec, TextIO, TypeVar
from wsgiref.simple_server import WSGIServer

import grpc
from prometheus_client import start_http_server

from common.errors import FailedPrecondition, InvalidInput
from common.metrics import STAGE_SECONDS, observe
from common.rpc.call_metrics import Sizes, counted_handler, served_call
from common.rpc.wrapping import Context, Handler, wrap_handler

REQUEST_ID_KEY = "fleet-request-id"
"""Metadata key under which a call carries the id of the request that it works for."""

LogFormat = Literal["text", "json"]

P = ParamSpec("P")
T = TypeVar("T")

_request_id: ContextVar[str] = ContextVar("fleet_request_id", default="")

_log = logging.getLogger(__name__)


@contextmanager
def request_scope(request_id: str) -> Iterator[None]:
    """Name the request in every log line written within, and in tasks started there."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


class _Formatter(logging.Formatter):
    """One line a record: text for a terminal, or a JSON object for a collector."""

    def __init__(self, service: str, form: LogFormat) -> None:
        super().__init__()
        self._service = service
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        fields = {
            "time": moment,
            "level": record.levelname.lower(),
            "service": self._service,
            "request": _request_id.get(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        fields = {name: value for name, value in fields.items() if value}
        if self._form == "json":
            return json.dumps(fields, ensure_ascii=False)
        return " ".join(f"{name}={_quoted(value)}" for name, value in fields.items())


def _quoted(value: str) -> str:
    """As it is when it is one plain word, else as a JSON string: a line stays a line."""
    plain = value.isprintable() and not any(character in value for character in ' "=')
    return value if plain else json.dumps(value, ensure_ascii=False)


def setup_logging(service: str, *, level: str = "INFO", form: LogFormat = "text", stream: TextIO | None = None) -> None:
    """Send this process's log records to `stream` (stderr), one line each; replaces what was set before."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_Formatter(service, form))
    logging.basicConfig(level=level, handlers=[handler], force=True)


@contextmanager
def stage_timer(service: str, model: str, stage: str) -> Iterator[None]:
    """Observe how long a stage computes, whether it succeeds or not."""
    started = time.perf_counter()
    try:
        yield
    finally:
        observe(STAGE_SECONDS.labels(service, model, stage), time.perf_counter() - started)


def in_current_context(work: Callable[P, T]) -> Callable[P, T]:
    """The same function, which runs in a copy of the present context, on whichever thread it is called."""
    return partial(copy_context().run, work)


@dataclass(frozen=True)
class MetricsServer:
    """The HTTP endpoint that Prometheus reads."""

    port: int
    _server: WSGIServer
    _thread: threading.Thread

    def stop(self) -> None:
        """End the endpoint and its thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_metrics(port: int, address: str = "0.0.0.0") -> MetricsServer:
    """Serve all metrics of this process over HTTP, with exemplars where a scraper asks for OpenMetrics; port 0: any.

    Raises InvalidInput for a number that is no port, and FailedPrecondition for a port that cannot be had.
    """
    try:
        server, thread = start_http_server(port, address)
    except OverflowError:
        raise InvalidInput(f"metrics_port: {port} is not from 0 to 65535; 9090 works", field="metrics_port") from None
    except OSError as error:
        message = f"metrics_port: {port} cannot be listened on: {error.strerror}; choose a free port"
        raise FailedPrecondition(message, field="metrics_port") from error
    _log.info("serves metrics port=%d", server.server_port)
    return MetricsServer(server.server_port, server, thread)


class MetricsInterceptor(grpc.aio.ServerInterceptor):
    """Counts and times the fleet's own calls, and names their request in the log."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the method's handler; anything but the fleet's own methods is passed on as it is."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.lstrip("/")
        if handler is None or not method.startswith("fleet."):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        sizes = Sizes()
        call = _MeasuredCall(method, str(metadata.get(REQUEST_ID_KEY, "")), sizes)
        return wrap_handler(counted_handler(handler, sizes), call.measure)


@dataclass(frozen=True)
class _MeasuredCall:
    method: str
    request_id: str
    sizes: Sizes

    @asynccontextmanager
    async def measure(self, context: Context) -> AsyncIterator[None]:
        _request_id.set(self.request_id)  # Never reset: every call is a task with a context of its own.
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
    """The status the handler set, by name; the context holds 0 or None until then, and may hold a plain number."""
    code: Any = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    names = {status.value[0]: status.name for status in grpc.StatusCode}
    return names[code] if code else unset
