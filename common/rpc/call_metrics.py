"""RPC metrics of gRFC A66: number, duration and message bytes of calls.

grpcio-observability is not used: it supports only the synchronous API and OpenTelemetry's registry. The metrics omit
the label `grpc_target`, because the set of worker addresses is unbounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import grpc
from prometheus_client import Histogram

from common.metrics import (
    CLIENT_ATTEMPT_SECONDS,
    CLIENT_ATTEMPTS_STARTED,
    CLIENT_RECEIVED_BYTES,
    CLIENT_SENT_BYTES,
    RPC_IN_FLIGHT,
    SERVER_CALL_SECONDS,
    SERVER_CALLS_STARTED,
    SERVER_RECEIVED_BYTES,
    SERVER_SENT_BYTES,
    observe,
)
from common.rpc.wrapping import Context, Handler, split_handler


@dataclass
class Sizes:
    """Total size of a call's messages in bytes."""

    sent: int = 0
    received: int = 0


# All tasks of an attempt share one Sizes object, because their contexts are copies that reference it.
_attempted: ContextVar[Sizes | None] = ContextVar("fleet_attempted_bytes", default=None)


def counted_handler(handler: Handler, sizes: Sizes) -> Handler:
    """Return the handler for one call, with its messages counted. A unary response is counted when the call ends."""
    make, behavior = split_handler(handler)
    deserialize, serialize = handler.request_deserializer, handler.response_serializer

    def receive(raw: bytes) -> Any:
        sizes.received += len(raw)
        return raw if deserialize is None else deserialize(raw)

    def send(message: Any) -> bytes:
        raw: bytes = message if serialize is None else serialize(message)
        sizes.sent += len(raw)
        return raw

    if handler.response_streaming:
        return make(behavior, request_deserializer=receive, response_serializer=send)

    async def reply(request: Any, context: Context) -> bytes:
        return send(await behavior(request, context))

    return make(reply, request_deserializer=receive, response_serializer=None)


@contextmanager
def served_call(method: str, sizes: Sizes) -> Iterator[Callable[[str], None]]:
    """Measure a call that a server handles. Yields a function that sets the status name, initially UNKNOWN."""
    began, status = time.perf_counter(), ["UNKNOWN"]
    SERVER_CALLS_STARTED.labels(method).inc()
    in_flight = RPC_IN_FLIGHT.labels(method)
    in_flight.inc()
    try:
        yield lambda name: status.__setitem__(0, name)
    finally:
        in_flight.dec()
        histograms = (SERVER_CALL_SECONDS, SERVER_SENT_BYTES, SERVER_RECEIVED_BYTES)
        _observe_end(histograms, method, status[0], began, sizes)


@dataclass
class ClientAttempt:
    """A call that this process makes. Its messages are counted by counted_stream() in the current context."""

    method: str
    _sizes: Sizes = field(default_factory=Sizes)
    _began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        CLIENT_ATTEMPTS_STARTED.labels(self.method).inc()
        _attempted.set(self._sizes)

    def end(self, code: grpc.StatusCode) -> None:
        """Record the end of the call with a status."""
        histograms = (CLIENT_ATTEMPT_SECONDS, CLIENT_SENT_BYTES, CLIENT_RECEIVED_BYTES)
        _observe_end(histograms, self.method, code.name, self._began, self._sizes)


def counted_stream(channel: grpc.aio.Channel, path: str) -> grpc.aio.StreamStreamMultiCallable[bytes, bytes]:
    """Return a method with messages of type bytes, counted for the ClientAttempt of the context."""

    def send(raw: bytes) -> bytes:
        if (sizes := _attempted.get()) is not None:
            sizes.sent += len(raw)
        return raw

    def receive(raw: bytes) -> bytes:
        if (sizes := _attempted.get()) is not None:
            sizes.received += len(raw)
        return raw

    return channel.stream_stream(path, send, receive)


def _observe_end(
    histograms: tuple[Histogram, Histogram, Histogram], method: str, status: str, began: float, sizes: Sizes
) -> None:
    values = (time.perf_counter() - began, sizes.sent, sizes.received)
    for histogram, value in zip(histograms, values, strict=True):
        observe(histogram.labels(method, status), value)
