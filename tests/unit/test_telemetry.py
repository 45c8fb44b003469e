"""Log lines name their request, and every call of the fleet's own services is measured with its code."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import urllib.request
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from prometheus_client import REGISTRY

from common import telemetry


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Put the root logger back as pytest had it."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def test_a_json_line_names_the_request_and_the_service() -> None:
    stream = io.StringIO()
    telemetry.setup_logging("denoising", form="json", stream=stream)
    with telemetry.request_scope("r-1"):
        logging.getLogger("here").warning("step %d", 3)
    line = json.loads(stream.getvalue())
    assert (line["service"], line["request"], line["message"]) == ("denoising", "r-1", "step 3")
    assert line["level"] == "warning"


def test_a_text_record_is_one_line_whatever_it_says() -> None:
    stream = io.StringIO()
    telemetry.setup_logging("decoding", stream=stream)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger().exception("a prompt\nwith a break")
    assert stream.getvalue().count("\n") == 1
    assert "two\\nlines" in stream.getvalue()
    assert "request=" not in stream.getvalue()


def test_metrics_are_served_over_http() -> None:
    with telemetry.stage_timer("decoding", "emoji", "DecodingStage"):
        pass
    server = telemetry.start_metrics(0, "127.0.0.1")
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as reply:
        text = reply.read().decode()
    server.stop()
    assert 'fleet_stage_seconds_count{model="emoji",service="decoding",stage="DecodingStage"}' in text


def _count(service: str, method: str, code: str) -> float:
    labels = {"service": service, "method": method, "code": code}
    return REGISTRY.get_sample_value("fleet_rpc_seconds_count", labels) or 0.0


def _in_flight(service: str, method: str) -> float | None:
    return REGISTRY.get_sample_value("fleet_rpc_in_flight", {"service": service, "method": method})


async def _unary(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    if request == b"bad":
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
    if request == b"defect":
        raise ZeroDivisionError
    return request


async def _stream(request: bytes, _: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
    yield request
    if request == b"endless":
        await asyncio.Event().wait()


async def _measured(service: str) -> None:
    server = grpc.aio.server(interceptors=[telemetry.MetricsInterceptor(service)])
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Unary": grpc.unary_unary_rpc_method_handler(_unary),
        "Stream": grpc.unary_stream_rpc_method_handler(_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fleet.v1.Test", handlers),))
    health: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Check": grpc.unary_unary_rpc_method_handler(_unary)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", health),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/fleet.v1.Test/Unary")
        assert await unary(b"fine") == b"fine"
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


def test_calls_are_counted_by_code(caplog: pytest.LogCaptureFixture) -> None:
    asyncio.run(_measured("test_counted"))
    assert "ZeroDivisionError" in caplog.text
    codes = ("OK", "INVALID_ARGUMENT", "UNKNOWN")
    assert [_count("test_counted", "Unary", code) for code in codes] == [1, 1, 1]
    assert [_count("test_counted", "Stream", code) for code in ("OK", "CANCELLED")] == [1, 1]
    assert _in_flight("test_counted", "Unary") == _in_flight("test_counted", "Stream") == 0
    assert _in_flight("test_counted", "Check") is None
