"""Measures calls as gRFC A66 does: how many began, their duration, and the bytes of their messages, by their end.

grpcio-observability would do that for the synchronous API alone, and in OpenTelemetry's registry. Metrics have no label
`grpc_target`: addresses of workers come and go, so that its values have no bound.
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
    """Bytes of a call's messages."""

    sent: int = 0
    received: int = 0


# The tasks of an attempt share one object: their contexts are copies, and refer to it.
_attempted: ContextVar[Sizes | None] = ContextVar("fleet_attempted_bytes", default=None)


def counted_handler(handler: Handler, sizes: Sizes) -> Handler:
    """The same handler for one call, whose messages are counted. Replies that are not streamed count at its end."""
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
    """Measure a call that a server handles; the given function sets the name of its status, at first UNKNOWN."""
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
    """A call that this process makes; its messages are counted in the context in which it is created."""

    method: str
    _sizes: Sizes = field(default_factory=Sizes)
    _began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        CLIENT_ATTEMPTS_STARTED.labels(self.method).inc()
        _attempted.set(self._sizes)

    def end(self, code: grpc.StatusCode) -> None:
        """The call has ended with a status."""
        histograms = (CLIENT_ATTEMPT_SECONDS, CLIENT_SENT_BYTES, CLIENT_RECEIVED_BYTES)
        _observe_end(histograms, self.method, code.name, self._began, self._sizes)


def counted_stream(channel: grpc.aio.Channel, path: str) -> grpc.aio.StreamStreamMultiCallable[bytes, bytes]:
    """A method whose messages are bytes, counted for the ClientAttempt in whose context it is called."""

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
