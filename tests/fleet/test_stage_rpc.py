"""Stages behind real servers: results, reports, errors, limits, cancellation and draining."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2

from async_tests import HANG_SECONDS, run_bounded, wait_until
from common.artifacts import Conditioning, Latents, Sampling, StepCheckpoint
from common.codec import unpack
from common.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    FleetError,
    HandedOver,
    InternalError,
    InvalidInput,
    ResourceExhausted,
    Unavailable,
)
from common.local import HostedStages, LocalRunner
from common.pipeline import PipelineError
from common.rpc.address import advertised_address
from common.rpc.client import RemoteRunner, open_channel
from common.rpc.fleet_server import FleetServer
from common.rpc.framing import CallLimits
from common.rpc.stage_servicer import ServicerLimits, StageServicer
from common.stage import STEP_CHECKPOINTS, Call, Contract
from common.tensors import TORCH
from stage_server import (
    CANVAS,
    Gate,
    ScriptedStage,
    Served,
    StageInput,
    artifacts,
    packets,
    run_served,
    step_checkpoint_of,
)
from step_checkpoints import Sink

Test = Callable[[Served], Awaitable[None]]


def result(outputs: Any) -> torch.Tensor:
    return unpack("denoised_latents", Latents, outputs["denoised_latents"], TORCH).parts["image"].latents


@pytest.mark.parametrize("count", [1, 16_384, 16_385, 300_000, 3_000_001])
def test_remote_and_local_runners_are_bit_equal(count: int) -> None:
    async def test(stage: Served) -> None:
        more = {"text_conditioning": Conditioning(prompt_embeds={"a": torch.randn(99_999), "b": torch.ones(())})}
        with ThreadPoolExecutor(1) as executor:
            local = await LocalRunner(stage.hosted, executor)(artifacts(count, **more), Call("r"))
        remote = await stage.runner()(packets(count, **more), stage.recorded.call())
        assert torch.equal(result(remote), local["denoised_latents"].parts["image"].latents)

    run_served(test)


def test_unix_socket_is_removed_with_its_server(tmp_path: Path) -> None:
    path = tmp_path / "stage.sock"

    async def test(stage: Served) -> None:
        assert stage.server.address == f"unix:{path}"
        await stage.runner()(packets(), stage.recorded.call())
        await stage.server.drain(1)
        assert not path.exists()

    run_served(test, listen=f"unix:{path}")


def test_reports_and_a_step_checkpoint_arrive_in_order() -> None:
    def script(x: StageInput, call: Call) -> None:
        call.warn("prompt", "cut “off”")
        call.progress(1, 2)
        call.checkpoint(step_checkpoint_of(x, 1))
        call.progress(2, 2)

    async def test(stage: Served) -> None:
        given = packets()
        outputs = await stage.runner()(given, stage.recorded.call())
        assert stage.recorded.progress == [(1, 2), (2, 2)]
        assert stage.recorded.warnings == [("prompt", "cut “off”")]
        (checkpoint,) = stage.recorded.checkpoints
        state = unpack("checkpoint", StepCheckpoint, checkpoint, TORCH)
        assert torch.equal(state.latents.parts["image"].latents, artifacts()["initial_latents"].parts["image"].latents)
        runner = RemoteRunner(stage.channel, "denoising", stage.hosted.contract)
        assert torch.equal(result(await runner(given, Call("without callbacks"))), result(outputs))

    run_served(test, script)


def test_local_and_remote_runner_send_equal_reports() -> None:
    """Reports are the start of the stages, warnings, progress and step checkpoints."""

    def script(x: StageInput, call: Call) -> None:
        call.warn("prompt", "cut")
        call.progress(1, 2)
        call.checkpoint(step_checkpoint_of(x, 1))
        call.progress(2, 2)

    def recorded(reports: list[Any]) -> Call:
        return Call(
            "r",
            on_progress=lambda step, total: reports.append((step, total)),
            on_warning=lambda name, text: reports.append((name, text)),
            sinks={STEP_CHECKPOINTS: Sink(reports.append)},
            on_begun=lambda: reports.append("begun"),
        )

    async def test(stage: Served) -> None:
        local: list[Any] = []
        with ThreadPoolExecutor(1) as executor:
            await LocalRunner(stage.hosted, executor)(artifacts(), recorded(local))
        remote: list[Any] = []
        await stage.runner()(packets(), recorded(remote))
        assert [type(each) for each in local] == [str, tuple, tuple, StepCheckpoint, tuple]
        states = [local.pop(3), unpack("checkpoint", StepCheckpoint, remote.pop(3), TORCH)]
        assert local == remote == ["begun", ("prompt", "cut"), (1, 2), (2, 2)]
        ours, theirs = (state.latents.parts["image"] for state in states)
        assert [state.step for state in states] == [1, 1]
        assert torch.equal(ours.latents, theirs.latents)
        assert ours.raw_latent_shape == theirs.raw_latent_shape

    run_served(test, script)


def test_only_first_and_last_of_quick_steps_are_reported() -> None:
    def script(x: StageInput, call: Call) -> None:
        del x
        for step in range(1, 6):
            call.progress(step, 5)

    async def test(stage: Served) -> None:
        await stage.runner()(packets(), stage.recorded.call())
        assert stage.recorded.progress == [(1, 5), (5, 5)]

    run_served(test, script, limits=ServicerLimits(step_seconds=3_600))


def test_cancelling_the_task_stops_the_stage_within_a_step() -> None:
    gate = Gate()

    async def test(stage: Served) -> None:
        task = asyncio.create_task(stage.runner()(packets(), stage.recorded.call()))
        await asyncio.to_thread(gate.entered.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until(lambda: not stage.servicer.in_flight)
        gate.opened.set()
        await wait_until(lambda: bool(gate.was_cancelled))
        assert gate.was_cancelled == [True]
        await stage.runner()(packets(), stage.recorded.call())  # the worker still serves

    run_served(test, gate)


def test_deadline_stops_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def script(_: StageInput, call: Call) -> None:
        try:
            assert call.cancelled.wait(HANG_SECONDS)
            call.check_cancelled()
        finally:
            ended.set()

    async def test(stage: Served) -> None:
        with pytest.raises(DeadlineExceeded):
            await stage.runner()(packets(), stage.recorded.call(deadline=time.monotonic() + 0.3))
        await asyncio.to_thread(ended.wait, 30)
        with pytest.raises(DeadlineExceeded, match="past its deadline"):
            await stage.runner()(packets(), stage.recorded.call(deadline=time.monotonic() - 1))
        monkeypatch.setattr("common.rpc.client._HOP_SECONDS", 60.0)
        with pytest.raises(DeadlineExceeded, match="cannot reach denoising"):
            await stage.runner()(packets(), stage.recorded.call(deadline=time.monotonic() + 30))

    run_served(test, script)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (InvalidInput("too many tokens", field="prompt"), InvalidInput, "too many tokens"),
        (Cancelled("stopped"), Cancelled, "stopped"),
        (RuntimeError("CUDA out of memory"), InternalError, "RuntimeError: CUDA out of memory"),
        (MemoryError(), InternalError, "MemoryError"),
        (KeyError("x"), InternalError, "KeyError: 'x'"),
    ],
)
def test_stage_errors_reach_the_caller(error: Exception, expected: type[FleetError], message: str) -> None:
    failures = [error]

    def script(_: StageInput, call: Call) -> None:
        del call
        if failures:
            raise failures.pop()

    async def test(stage: Served) -> None:
        with pytest.raises(expected, match=message) as caught:
            await stage.runner()(packets(), stage.recorded.call())
        assert caught.value.field == (error.field if isinstance(error, FleetError) else "")
        await stage.runner()(packets(), stage.recorded.call())  # the worker still serves

    run_served(test, script)


def test_calls_beyond_the_capacity_are_refused() -> None:
    gate = Gate()

    async def test(stage: Served) -> None:
        first = asyncio.create_task(stage.runner()(packets(), stage.recorded.call()))
        await asyncio.to_thread(gate.entered.wait, 30)
        with pytest.raises(ResourceExhausted, match="maximum of 1 concurrent calls"):
            await stage.runner()(packets(), stage.recorded.call())
        gate.opened.set()
        await first
        for _ in range(20):  # the worker slot is free once the caller has the result
            await stage.runner()(packets(8), stage.recorded.call())

    run_served(test, gate)


def test_buffers_are_reused_and_never_shared() -> None:
    first: list[torch.Tensor] = []

    def script(x: StageInput, call: Call) -> None:
        del call
        if not first:
            first.append(x.initial_latents.parts["image"].latents)

    async def test(stage: Served) -> None:
        for _ in range(3):
            await stage.runner()(packets(), stage.recorded.call())
        gc.collect()
        assert stage.servicer.pool.idle_bytes == 4 << 20
        assert torch.equal(first[0], artifacts()["initial_latents"].parts["image"].latents)

    run_served(test, script)


def test_unread_and_missing_slots_are_refused() -> None:
    async def test(stage: Served) -> None:
        with pytest.raises(InvalidInput, match="canvas: an artifact was sent, but") as caught:
            await stage.runner()(packets(canvas=CANVAS), stage.recorded.call())
        assert caught.value.field == "canvas"
        for slot in ("sampling", "initial_latents"):
            given = packets()
            del given[slot]
            with pytest.raises(InvalidInput, match=f"{slot} is missing") as caught:
                await stage.runner()(given, stage.recorded.call())
            assert caught.value.field == slot

    run_served(test)


def test_call_size_is_bounded() -> None:
    async def test(stage: Served) -> None:
        with pytest.raises(ResourceExhausted, match=r"initial_latents\.parts\.image\.latents: a total of"):
            await stage.runner()(packets(), stage.recorded.call())
        await stage.runner()(packets(8), stage.recorded.call())

    run_served(test, limits=ServicerLimits(call=CallLimits(total_bytes=1000)))


def test_reply_size_is_bounded() -> None:
    async def test(stage: Served) -> None:
        with pytest.raises(ResourceExhausted, match="denoised_latents"):
            await stage.runner(limits=CallLimits(total_bytes=1000))(packets(), stage.recorded.call())

    run_served(test)


def test_too_large_header_is_refused_before_it_is_sent() -> None:
    async def test(stage: Served) -> None:
        sampling = Sampling(num_inference_steps=1, seed=1, params={"text": "x" * (17 << 20)})
        with pytest.raises(ResourceExhausted, match="sampling: a header of") as caught:
            await stage.runner()(packets(sampling=sampling), stage.recorded.call())
        assert caught.value.field == "sampling"

    run_served(test)


def test_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "x.sock"))

    async def test(stage: Served) -> None:
        await stage.runner()(packets(8), stage.recorded.call())

    run_served(test, listen=f"unix:{tmp_path}/x.sock")


def test_silent_caller_times_out() -> None:
    async def test(stage: Served) -> None:
        call: Any = stage.channel.stream_stream("/fleet.v1.DenoisingService/Denoise")()
        with pytest.raises(grpc.aio.AioRpcError, match=r"no frame was received for 0\.1 s"):
            await call.read()
        await wait_until(lambda: not stage.servicer.in_flight)

    run_served(test, limits=ServicerLimits(idle_seconds=0.1))


def test_contract_that_does_not_fit_the_rpc_is_refused() -> None:
    class Odd:
        contract = Contract("Odd", {"canvas": "Prompt"}, {})

        def contract_of(self, variant: str) -> Contract:
            """Never called."""
            raise AssertionError(variant)

        def run(self, values: Any, call: Call) -> dict[str, Any]:
            """Never called."""
            raise AssertionError((values, call))

    with ThreadPoolExecutor(1) as executor, pytest.raises(PipelineError, match="reads 'canvas' as Prompt"):
        StageServicer("denoising", Odd(), executor, TORCH)


def test_draining_finishes_running_calls_and_refuses_new_ones() -> None:
    gate = Gate()

    async def test(stage: Served) -> None:
        running = asyncio.create_task(stage.runner()(packets(), stage.recorded.call()))
        await asyncio.to_thread(gate.entered.wait, 30)
        assert await health(stage.channel) == health_pb2.HealthCheckResponse.SERVING
        draining = asyncio.create_task(stage.server.drain(30))
        await wait_until(lambda: stage.server.gate.closed)
        assert await health(stage.channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(Unavailable, match="shutting down"):
            await stage.runner()(packets(), stage.recorded.call())
        assert not draining.done()
        gate.opened.set()
        assert result(await running).any()
        await draining
        with pytest.raises(Unavailable):
            await stage.runner()(packets(), stage.recorded.call())

    run_served(test, gate)


def test_handed_over_call_ends_as_unavailable_with_its_step_checkpoint() -> None:
    """A call that has not begun ends immediately. Older coordinators retry UNAVAILABLE at another worker."""
    reached, opened = threading.Event(), threading.Event()

    def script(x: StageInput, call: Call) -> None:
        reached.set()
        assert opened.wait(HANG_SECONDS)
        assert call.must_hand_over()
        call.checkpoint(step_checkpoint_of(x, 1))
        raise HandedOver("handed over after 1 steps")

    async def test(stage: Served) -> None:
        computed: list[float] = []
        running = asyncio.create_task(stage.runner()(packets(), stage.recorded.call(on_computed=computed.append)))
        assert await asyncio.to_thread(reached.wait, HANG_SECONDS)
        waiting = asyncio.create_task(stage.runner()(packets(), Call("waits", on_computed=computed.append)))
        while len(stage.servicer.running()) < 2:  # noqa: ASYNC110 -- no event to wait for
            await asyncio.sleep(0.01)
        first, second = stage.servicer.running()
        assert (first.has_begun, second.has_begun) == (True, False)
        second.hand_over()
        with pytest.raises(HandedOver, match="before its stages started") as caught:
            await waiting
        cause = cast(grpc.aio.AioRpcError, caught.value.__cause__)
        assert cause.code() is grpc.StatusCode.UNAVAILABLE
        assert dict(cause.trailing_metadata() or ())["fleet-error"] == "HandedOver"
        assert not first.is_asked
        first.hand_over()
        opened.set()
        with pytest.raises(HandedOver, match="after 1 steps"):
            await running
        assert len(stage.recorded.checkpoints) == 1
        (seconds,) = computed  # of the first call only, as the second call has not begun
        assert 0 < seconds < 60
        assert not stage.servicer.running()

    run_served(test, script, limits=ServicerLimits(capacity=2))


def test_draining_ends_after_the_grace_period() -> None:
    gate = Gate()

    async def test(stage: Served) -> None:
        running = asyncio.create_task(stage.runner()(packets(), stage.recorded.call()))
        await asyncio.to_thread(gate.entered.wait, 30)
        await stage.server.drain(0.1)
        with pytest.raises(Unavailable):
            await running
        gate.opened.set()

    run_served(test, gate)


async def health(channel: grpc.aio.Channel, service: str = "") -> Any:
    check: Any = channel.unary_unary(
        "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
    )
    return (await check(health_pb2.HealthCheckRequest(service=service).SerializeToString())).status


def test_closed_channel_is_unavailable_and_not_cancelled() -> None:
    gate = Gate()

    async def test(stage: Served) -> None:
        channel = open_channel(stage.server.address)
        runner = RemoteRunner(channel, "denoising", stage.hosted.contract)
        task = asyncio.create_task(runner(packets(), Call("r")))
        await asyncio.to_thread(gate.entered.wait, 30)
        await channel.close()
        with pytest.raises(Unavailable, match="was closed during the call"):
            await task
        gate.opened.set()

    run_served(test, gate)


def test_unusable_address_is_reported(tmp_path: Path) -> None:
    async def test() -> None:
        first, second = FleetServer("127.0.0.1:0"), FleetServer(f"unix:{tmp_path}/x.sock")
        for listen, message in (
            (await first.start(), "Address already in use"),
            (await second.start(), "another process listens on it"),
            ("nonsense", "an address is HOST:PORT"),
            ("127.0.0.1:65536", "an address is HOST:PORT"),
            ("no.such.host.invalid:0", "cannot listen on no.such.host.invalid"),
            (f"unix:{tmp_path}/missing/x.sock", "there is no directory"),
            (f"unix:{tmp_path}", "a file with this path exists"),
            (f"unix:{tmp_path}/{'x' * 120}", "more than 107 bytes"),
        ):
            with pytest.raises(FailedPrecondition, match=message) as caught:
                await FleetServer(listen).start()
            assert caught.value.field == "listen"
            assert "\n" not in caught.value.message
        await first.drain(0)
        await second.drain(0)

    run_bounded(test)


@pytest.mark.parametrize(
    ("bound", "redis_url", "advertised"),
    [
        ("127.0.0.1:5", "redis://10.0.0.1:6379", "127.0.0.1:5"),
        ("unix:/x", "redis://10.0.0.1:6379", "unix:/x"),
        ("0.0.0.0:5", "redis://127.0.0.1:6379/0", "127.0.0.1:5"),
        ("[::]:5", "redis://127.0.0.1", "127.0.0.1:5"),
        ("0.0.0.0:5", "unix:///tmp/store.sock", "127.0.0.1:5"),
        ("0.0.0.0:5", "redis://no.such.host.invalid", "127.0.0.1:5"),
    ],
)
def test_wildcard_address_is_advertised_as_the_interface_towards_the_store(
    bound: str, redis_url: str, advertised: str
) -> None:
    assert advertised_address(bound, redis_url) == advertised


def test_missing_server_is_unavailable() -> None:
    async def test() -> None:
        async with open_channel("127.0.0.1:1") as channel:
            contract = HostedStages("denoising", [ScriptedStage()]).contract
            with pytest.raises(Unavailable):
                await RemoteRunner(channel, "denoising", contract)(packets(), Call("r"))

    run_bounded(test)
