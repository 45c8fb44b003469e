"""What an operator sees of a process: log lines that name their request, and Prometheus metrics.

Free of torch. Metrics are named fleet_…; the label `service` is the folder's name, so that the services of one process
stay apart. Only the fleet's own RPCs are measured: health checks and reflection would drown them.
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
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TextIO
from wsgiref.simple_server import WSGIServer

import grpc
from prometheus_client import Counter, Gauge, Histogram, start_http_server

from common.rpc.wrapping import Context, Handler, wrap_handler

REQUEST_ID_KEY = "fleet-request-id"
"""Metadata key under which a call carries the id of the request that it works for."""

LogFormat = Literal["text", "json"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

RPC_SECONDS = Histogram(
    "fleet_rpc_seconds", "Duration of a call, as its server sees it", ("service", "method", "code"), buckets=_SECONDS
)
RPC_IN_FLIGHT = Gauge("fleet_rpc_in_flight", "Calls being served", ("service", "method"))
STAGE_SECONDS = Histogram(
    "fleet_stage_seconds", "Computing time of a stage", ("service", "model", "stage"), buckets=_SECONDS
)
CACHE_LOOKUPS = Counter(
    "fleet_reply_cache_lookups", "Calls that may be answered from a cache", ("service", "model", "result")
)
SHARED_CACHE_LOOKUPS = Counter(
    "fleet_shared_reply_cache_lookups", "Of these, calls that were looked up in Redis", ("service", "model", "result")
)
CACHE_BYTES = Gauge("fleet_reply_cache_bytes", "Memory of kept replies", ("service", "model"))
QUEUE_LENGTH = Gauge("fleet_queue_length", "Requests that wait for a slot", ("service", "model"))
QUEUED_SECONDS = Gauge(
    "fleet_queued_seconds", "Compute seconds of work that wait or run: remaining steps times pace", ("service", "model")
)
WORKERS_HELD = Gauge("fleet_workers_held", "Workers that run a request", ("service", "model"))
STORE_BYTES = Gauge("fleet_store_bytes", "Memory of the request store in use")
STORE_LIMIT_BYTES = Gauge("fleet_store_limit_bytes", "Memory in use from which on Submit is refused; 0 without a bound")
STORE_REPAIRS = Gauge("fleet_store_repairs", "Damaged entries that were removed from the request store", ("kind",))
REQUESTS = Counter("fleet_requests", "Requests that reached their terminal state", ("model", "state"))
LOST_CALLS = Counter(
    "fleet_lost_calls",
    "Calls that were lost with their worker, by whether their stages had begun",
    ("service", "model", "begun"),
)
HANDED_OVER_CALLS = Counter(
    "fleet_handed_over_calls", "Calls that a leaving worker has handed over to another one", ("service", "model")
)
STEPS_SAVED = Counter(
    "fleet_steps_saved", "Denoising steps that were not done because their request was cancelled or expired", ("model",)
)

_request_id: ContextVar[str] = ContextVar("fleet_request_id", default="")


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
        STAGE_SECONDS.labels(service, model, stage).observe(time.perf_counter() - started)


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
    """Serve all metrics of this process over HTTP; port 0 picks a free one. Raises OSError when the port is taken."""
    server, thread = start_http_server(port, address)
    return MetricsServer(server.server_port, server, thread)


class MetricsInterceptor(grpc.aio.ServerInterceptor):
    """Counts and times the fleet's own calls, and names their request in the log."""

    def __init__(self, service: str) -> None:
        self._service = service

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the method's handler; anything but the fleet's own methods is passed on as it is."""
        handler = await continuation(handler_call_details)
        package, _, method = handler_call_details.method.lstrip("/").partition("/")
        if handler is None or not package.startswith("fleet."):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        call = _MeasuredCall(self._service, method, str(metadata.get(REQUEST_ID_KEY, "")))
        return wrap_handler(handler, call.measure)


@dataclass(frozen=True)
class _MeasuredCall:
    service: str
    method: str
    request_id: str

    @asynccontextmanager
    async def measure(self, context: Context) -> AsyncIterator[None]:
        started = time.perf_counter()
        in_flight = RPC_IN_FLIGHT.labels(self.service, self.method)
        in_flight.inc()
        code = "UNKNOWN"
        _request_id.set(self.request_id)  # Never reset: every call is a task with a context of its own.
        try:
            yield
            code = _code(context, "OK")
        except (asyncio.CancelledError, GeneratorExit):
            code = "CANCELLED"
            raise
        except grpc.aio.AbortError:
            code = _code(context, "UNKNOWN")
            raise
        finally:
            in_flight.dec()
            RPC_SECONDS.labels(self.service, self.method, code).observe(time.perf_counter() - started)


def _code(context: Context, unset: str) -> str:
    """The status the handler set, by name; the context holds 0 or None until then, and may hold a plain number."""
    code: Any = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    names = {status.value[0]: status.name for status in grpc.StatusCode}
    return names[code] if code else unset
