"""Metrics and traces of stage calls: attempts with their bytes, and stages within the call's trace."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import REGISTRY

from async_tests import HANG_SECONDS, run_bounded
from common.errors import InvalidInput
from common.stage import Call
from common.trace_context import Span, TraceContext, current_trace_id, entered
from stage_server import StageInput, packets, served

_METHOD = "fleet.v1.DenoisingService/Denoise"
_NUMBERS = 1 << 20
_BYTES = 4 * _NUMBERS


def _value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, {"grpc_method": _METHOD, **labels}) or 0.0


def _attempts(status: str) -> dict[str, float]:
    """Number and bytes of the attempts that ended with a gRPC status."""
    base = "grpc_client_attempt"
    return {
        "count": _value(f"{base}_duration_seconds_count", grpc_status=status),
        "sent": _value(f"{base}_sent_total_compressed_message_size_bytes_sum", grpc_status=status),
        "received": _value(f"{base}_rcvd_total_compressed_message_size_bytes_sum", grpc_status=status),
    }


def test_attempt_is_measured_with_its_bytes() -> None:
    async def scenario() -> None:
        async with served() as stage:
            await stage.runner()(packets(_NUMBERS), stage.recorded.call())

    before = _attempts("OK")
    run_bounded(scenario)
    after = _attempts("OK")
    assert after["count"] - before["count"] == 1
    for direction in ("sent", "received"):
        assert _BYTES < after[direction] - before[direction] < 1.01 * _BYTES


def test_failed_attempt_is_measured_with_its_status() -> None:
    def fail(_: StageInput, call: Call) -> None:
        raise InvalidInput(f"request {call.request_id} is wrong")

    async def scenario() -> None:
        async with served(fail) as stage:
            with pytest.raises(InvalidInput):
                await stage.runner()(packets(8), stage.recorded.call())

    before = _attempts("INVALID_ARGUMENT")["count"]
    run_bounded(scenario)
    assert _attempts("INVALID_ARGUMENT")["count"] - before == 1


def test_cancelled_attempt_is_measured() -> None:
    async def scenario() -> None:
        started, loop = asyncio.Event(), asyncio.get_running_loop()

        def wait(_: StageInput, call: Call) -> None:
            loop.call_soon_threadsafe(started.set)
            assert call.cancelled.wait(HANG_SECONDS)
            call.check_cancelled()

        async with served(wait) as stage:
            task = asyncio.create_task(stage.runner()(packets(8), stage.recorded.call()))
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    before = _attempts("CANCELLED")["count"]
    run_bounded(scenario)
    assert _attempts("CANCELLED")["count"] - before == 1


def test_stages_run_in_the_trace_of_their_call() -> None:
    found: list[str | None] = []

    async def scenario() -> None:
        async with served(lambda *_: found.append(current_trace_id())) as stage:
            with entered(Span(TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"))):
                await stage.runner()(packets(8), stage.recorded.call())

    run_bounded(scenario)
    assert found == ["4bf92f3577b34da6a3ce929d0e0e4736"]


@pytest.mark.parametrize("tokens", [4_096, 0])
def test_number_of_tokens_is_sent_with_the_call(tokens: int) -> None:
    found: list[int] = []

    async def scenario() -> None:
        async with served(lambda _, call: found.append(call.tokens)) as stage:
            await stage.runner()(packets(8), stage.recorded.call(tokens=tokens))

    run_bounded(scenario)
    assert found == [tokens]
