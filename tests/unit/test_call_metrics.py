"""Metrics of gRPC calls: status, duration and message sizes in bytes; health checks are excluded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from prometheus_client import REGISTRY

from common.rpc.call_metrics import ClientAttempt, counted_stream
from common.telemetry import MetricsInterceptor


def _value(name: str, method: str, status: str | None = None) -> float:
    labels = {"grpc_method": f"fleet.v1.Test/{method}"} | ({"grpc_status": status} if status else {})
    return REGISTRY.get_sample_value(name, labels) or 0.0


def _ended(method: str, status: str) -> float:
    return _value("grpc_server_call_duration_seconds_count", method, status)


async def _unary(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    if request == b"bad":
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
    if request == b"defect":
        raise ZeroDivisionError
    return 2 * request


async def _stream(request: bytes, _: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
    yield request
    if request == b"endless":
        await asyncio.Event().wait()


async def _echo(requests: AsyncIterator[bytes], _: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request + request


async def _serve() -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(interceptors=[MetricsInterceptor()])
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Unary": grpc.unary_unary_rpc_method_handler(_unary),
        "Stream": grpc.unary_stream_rpc_method_handler(_stream),
        "Echo": grpc.stream_stream_rpc_method_handler(_echo),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fleet.v1.Test", handlers),))
    health: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Check": grpc.unary_unary_rpc_method_handler(_unary)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", health),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


async def _call_all() -> None:
    server, port = await _serve()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/fleet.v1.Test/Unary")
        assert await unary(b"fine") == b"finefine"
        for wrong in (b"bad", b"defect"):
            with pytest.raises(grpc.aio.AioRpcError):
                await unary(wrong)
        stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream("/fleet.v1.Test/Stream")
        assert [data async for data in stream(b"once")] == [b"once"]
        endless = stream(b"endless")
        assert await endless.read() == b"endless"
        endless.cancel()
        check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
        await check(b"fine")
    await server.stop(None)


def test_served_calls_are_counted_by_status(caplog: pytest.LogCaptureFixture) -> None:
    asyncio.run(_call_all())
    assert "ZeroDivisionError" in caplog.text
    assert [_ended("Unary", status) for status in ("OK", "INVALID_ARGUMENT", "UNKNOWN")] == [1, 1, 1]
    assert [_ended("Stream", status) for status in ("OK", "CANCELLED")] == [1, 1]
    assert _value("grpc_server_call_started_total", "Unary") == 3
    assert _value("fleet_rpc_in_flight", "Unary") == _value("fleet_rpc_in_flight", "Stream") == 0
    received = "grpc_server_call_rcvd_total_compressed_message_size_bytes_sum"
    sent = "grpc_server_call_sent_total_compressed_message_size_bytes_sum"
    assert (_value(received, "Unary", "OK"), _value(sent, "Unary", "OK")) == (4, 8)
    assert (_value(received, "Stream", "OK"), _value(sent, "Stream", "OK")) == (4, 4)
    methods = {dict(each.labels).get("grpc_method") for family in REGISTRY.collect() for each in family.samples}
    assert "grpc.health.v1.Health/Check" not in methods, "health checks must not be counted"


async def _call_echo() -> None:
    server, port = await _serve()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        echo = counted_stream(channel, "/fleet.v1.Test/Echo")
        for messages in ([b"one", b"three"], [b"four"]):
            attempt = ClientAttempt("fleet.v1.Test/Echo")
            call = echo(iter(messages))
            assert [reply async for reply in call] == [each + each for each in messages]
            attempt.end(await call.code())
        attempt = ClientAttempt("fleet.v1.Test/Echo")
        call = echo(iter([b"x"]))
        call.cancel()
        attempt.end(await call.code())
    await server.stop(None)


def test_client_attempts_are_measured_by_status() -> None:
    asyncio.run(_call_echo())
    assert _value("grpc_client_attempt_started_total", "Echo") == 3
    ended = [_value("grpc_client_attempt_duration_seconds_count", "Echo", status) for status in ("OK", "CANCELLED")]
    assert ended == [2, 1]
    sent = "grpc_client_attempt_sent_total_compressed_message_size_bytes_sum"
    received = "grpc_client_attempt_rcvd_total_compressed_message_size_bytes_sum"
    assert (_value(sent, "Echo", "OK"), _value(received, "Echo", "OK")) == (12, 24)
