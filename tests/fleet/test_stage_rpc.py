"""Stages behind real servers: what they compute, what they report, how they end."""

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
    served,
    step_checkpoint_of,
)
from step_checkpoints import Sink

Test = Callable[[Served], Awaitable[None]]


def run(test: Test, script: Any = None, **options: Any) -> None:
    """Run a test against a served stage."""

    async def main() -> None:
        async with asyncio.timeout(60), served(*([script] if script else []), **options) as stage:
            await test(stage)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or process does; the test's own timeout bounds it."""
    while not condition():  # noqa: ASYNC110 -- nothing tells
        await asyncio.sleep(0.005)


def result(outputs: Any) -> torch.Tensor:
    return unpack("denoised_latents", Latents, outputs["denoised_latents"], TORCH).parts["image"].latents


@pytest.mark.parametrize("count", [1, 16_384, 16_385, 300_000, 3_000_001])
def test_remote_and_local_runners_are_bit_equal(count: int) -> None:
    async def test(stage: Served) -> None:
        more = {"text_conditioning": Conditioning(prompt_embeds={"a": torch.randn(99_999), "b": torch.ones(())})}
        with ThreadPoolExecutor(1) as executor:
            local = await LocalRunner(stage.hosted, executor)(artifacts(count, **more), Call("r"))
        remote = await stage.runner()(packets(count, **more), stage.heard.call())
        assert torch.equal(result(remote), local["denoised_latents"].parts["image"].latents)

    run(test)


def test_unix_socket_goes_with_its_server(tmp_path: Path) -> None:
    path = tmp_path / "stage.sock"

    async def test(stage: Served) -> None:
        assert stage.server.address == f"unix:{path}"
        await stage.runner()(packets(), stage.heard.call())
        await stage.server.drain(1)
        assert not path.exists()

    run(test, listen=f"unix:{path}")


def test_reports_come_in_order_and_checkpoints_hold_what_was() -> None:
    def script(x: StageInput, call: Call) -> None:
        call.warn("prompt", "cut “off”")
        call.progress(1, 2)
        call.checkpoint(step_checkpoint_of(x, 1))
        call.progress(2, 2)

    async def test(stage: Served) -> None:
        given = packets()
        outputs = await stage.runner()(given, stage.heard.call())
        assert stage.heard.progress == [(1, 2), (2, 2)]
        assert stage.heard.warnings == [("prompt", "cut “off”")]
        (checkpoint,) = stage.heard.checkpoints
        state = unpack("checkpoint", StepCheckpoint, checkpoint, TORCH)
        assert torch.equal(state.latents.parts["image"].latents, artifacts()["initial_latents"].parts["image"].latents)
        unheard = RemoteRunner(stage.channel, "denoising", stage.hosted.contract)
        assert torch.equal(result(await unheard(given, Call("r"))), result(outputs))

    run(test, script)


def test_both_runners_report_the_same_to_a_call() -> None:
    """Exchanging them loses neither checkpoints nor progress, warnings or the start of the stages."""

    def script(x: StageInput, call: Call) -> None:
        call.warn("prompt", "cut")
        call.progress(1, 2)
        call.checkpoint(step_checkpoint_of(x, 1))
        call.progress(2, 2)

    def heard(reports: list[Any]) -> Call:
        return Call(
            "r",
            on_progress=lambda step, total: reports.append((step, total)),
            on_warning=lambda name, text: reports.append((name, text)),
            sinks={STEP_CHECKPOINTS: Sink(reports.append)},
            on_begun=lambda: reports.append("begun"),
        )

    async def test(stage: Served) -> None:
        near: list[Any] = []
        with ThreadPoolExecutor(1) as executor:
            await LocalRunner(stage.hosted, executor)(artifacts(), heard(near))
        far: list[Any] = []
        await stage.runner()(packets(), heard(far))
        assert [type(each) for each in near] == [str, tuple, tuple, StepCheckpoint, tuple]
        states = [near.pop(3), unpack("checkpoint", StepCheckpoint, far.pop(3), TORCH)]
        assert near == far == ["begun", ("prompt", "cut"), (1, 2), (2, 2)]
        ours, theirs = (state.latents.parts["image"] for state in states)
        assert [state.step for state in states] == [1, 1]
        assert torch.equal(ours.latents, theirs.latents)
        assert ours.raw_latent_shape == theirs.raw_latent_shape

    run(test, script)


def test_of_quick_steps_the_first_and_the_last_are_reported() -> None:
    def script(x: StageInput, call: Call) -> None:
        del x
        for step in range(1, 6):
            call.progress(step, 5)

    async def test(stage: Served) -> None:
        await stage.runner()(packets(), stage.heard.call())
        assert stage.heard.progress == [(1, 5), (5, 5)]

    run(test, script, limits=ServicerLimits(step_seconds=3_600))


def test_cancelling_the_task_stops_the_stage_within_a_step() -> None:
    gate = Gate()

    async def test(stage: Served) -> None:
        task = asyncio.create_task(stage.runner()(packets(), stage.heard.call()))
        await asyncio.to_thread(gate.entered.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not stage.servicer.in_flight)
        gate.opened.set()
        await until(lambda: bool(gate.cancelled_within))
        assert gate.cancelled_within == [True]
        await stage.runner()(packets(), stage.heard.call())  # The worker lives.

    run(test, gate)


def test_a_deadline_stops_the_stage() -> None:
    ended = threading.Event()

    def script(_: StageInput, call: Call) -> None:
        try:
            assert call.cancelled.wait(30)
            call.check_cancelled()
        finally:
            ended.set()

    async def test(stage: Served) -> None:
        with pytest.raises(DeadlineExceeded):
            await stage.runner()(packets(), stage.heard.call(deadline=time.monotonic() + 0.3))
        await asyncio.to_thread(ended.wait, 30)
        with pytest.raises(DeadlineExceeded, match="past its deadline"):
            await stage.runner()(packets(), stage.heard.call(deadline=time.monotonic() - 1))
        with pytest.raises(DeadlineExceeded, match="cannot reach denoising"):
            await stage.runner()(packets(), stage.heard.call(deadline=time.monotonic() + 0.002))

    run(test, script)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (InvalidInput("too many tokens", field="prompt"), InvalidInput, "too many tokens"),
        (Cancelled("stopped"), Cancelled, "stopped"),
        (RuntimeError("CUDA out of memory"), InternalError, "RuntimeError: CUDA out of memory"),
        (MemoryError(), InternalError, "MemoryError"),
        (KeyError("x"), InternalError, "KeyError: 'x'"),
    ],
)
def test_what_a_stage_raises_is_what_the_caller_gets(error: Exception, kind: type[FleetError], words: str) -> None:
    failures = [error]

    def script(_: StageInput, call: Call) -> None:
        del call
        if failures:
            raise failures.pop()

    async def test(stage: Served) -> None:
        with pytest.raises(kind, match=words) as caught:
            await stage.runner()(packets(), stage.heard.call())
        assert caught.value.field == (error.field if isinstance(error, FleetError) else "")
        await stage.runner()(packets(), stage.heard.call())  # The worker lives.

    run(test, script)


def test_capacity_is_the_servers_truth() -> None:
    gate = Gate()

    async def test(stage: Served) -> None:
        first = asyncio.create_task(stage.runner()(packets(), stage.heard.call()))
        await asyncio.to_thread(gate.entered.wait, 30)
        with pytest.raises(ResourceExhausted, match="maximum of 1 concurrent calls"):
            await stage.runner()(packets(), stage.heard.call())
        gate.opened.set()
        await first
        for _ in range(20):  # The place is free by the time that the answer is there.
            await stage.runner()(packets(8), stage.heard.call())

    run(test, gate)


def test_buffers_are_used_again_and_never_shared() -> None:
    kept: list[torch.Tensor] = []

    def script(x: StageInput, call: Call) -> None:
        del call
        if not kept:
            kept.append(x.initial_latents.parts["image"].latents)

    async def test(stage: Served) -> None:
        for _ in range(3):
            await stage.runner()(packets(), stage.heard.call())
        gc.collect()
        assert stage.servicer.pool.idle_bytes == 4 << 20
        assert torch.equal(kept[0], artifacts()["initial_latents"].parts["image"].latents)

    run(test, script)


def test_a_slot_that_nobody_reads_or_wants_is_refused() -> None:
    async def test(stage: Served) -> None:
        with pytest.raises(InvalidInput, match="canvas is present, but") as caught:
            await stage.runner()(packets(canvas=CANVAS), stage.heard.call())
        assert caught.value.field == "canvas"
        for slot in ("sampling", "initial_latents"):
            given = packets()
            del given[slot]
            with pytest.raises(InvalidInput, match=f"{slot} is missing") as caught:
                await stage.runner()(given, stage.heard.call())
            assert caught.value.field == slot

    run(test)


def test_a_call_may_not_carry_more_than_the_limit() -> None:
    async def test(stage: Served) -> None:
        with pytest.raises(ResourceExhausted, match=r"initial_latents\.parts\.image\.latents brings"):
            await stage.runner()(packets(), stage.heard.call())
        await stage.runner()(packets(8), stage.heard.call())

    run(test, limits=ServicerLimits(call=CallLimits(total_bytes=1000)))


def test_a_reply_may_not_carry_more_than_the_limit() -> None:
    async def test(stage: Served) -> None:
        with pytest.raises(ResourceExhausted, match="denoised_latents"):
            await stage.runner(limits=CallLimits(total_bytes=1000))(packets(), stage.heard.call())

    run(test)


def test_a_header_that_no_worker_takes_is_reported_before_it_is_sent() -> None:
    async def test(stage: Served) -> None:
        sampling = Sampling(num_inference_steps=1, seed=1, params={"text": "x" * (17 << 20)})
        with pytest.raises(ResourceExhausted, match="sampling makes a header of") as caught:
            await stage.runner()(packets(sampling=sampling), stage.heard.call())
        assert caught.value.field == "sampling"

    run(test)


def test_a_socket_left_behind_is_taken_over(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "x.sock"))

    async def test(stage: Served) -> None:
        await stage.runner()(packets(8), stage.heard.call())

    run(test, listen=f"unix:{tmp_path}/x.sock")


def test_a_silent_caller_is_given_up() -> None:
    async def test(stage: Served) -> None:
        call: Any = stage.channel.stream_stream("/fleet.v1.DenoisingService/Denoise")()
        with pytest.raises(grpc.aio.AioRpcError, match=r"no frame was received for 0\.1 s"):
            await call.read()
        await until(lambda: not stage.servicer.in_flight)

    run(test, limits=ServicerLimits(idle_seconds=0.1))


def test_a_contract_beyond_the_rpc_starts_nothing() -> None:
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


def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    gate = Gate()

    async def test(stage: Served) -> None:
        running = asyncio.create_task(stage.runner()(packets(), stage.heard.call()))
        await asyncio.to_thread(gate.entered.wait, 30)
        assert await health(stage.channel) == health_pb2.HealthCheckResponse.SERVING
        draining = asyncio.create_task(stage.server.drain(30))
        await until(lambda: stage.server.gate.closed)
        assert await health(stage.channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(Unavailable, match="shutting down"):
            await stage.runner()(packets(), stage.heard.call())
        assert not draining.done()
        gate.opened.set()
        assert result(await running).any()
        await draining
        with pytest.raises(Unavailable):
            await stage.runner()(packets(), stage.heard.call())

    run(test, gate)


def test_a_call_that_is_handed_over_ends_as_unavailable_with_its_checkpoint() -> None:
    """A call that has not begun ends at once. Coordinators of before know the status, and try another worker."""
    reached, opened = threading.Event(), threading.Event()

    def script(x: StageInput, call: Call) -> None:
        reached.set()
        assert opened.wait(20)
        assert call.must_hand_over()
        call.checkpoint(step_checkpoint_of(x, 1))
        raise HandedOver("handed over after 1 steps")

    async def test(stage: Served) -> None:
        computed: list[float] = []
        running = asyncio.create_task(stage.runner()(packets(), stage.heard.call(on_computed=computed.append)))
        assert await asyncio.to_thread(reached.wait, 20)
        waiting = asyncio.create_task(stage.runner()(packets(), Call("waits", on_computed=computed.append)))
        while len(stage.servicer.running()) < 2:  # noqa: ASYNC110 -- no event to wait for
            await asyncio.sleep(0.01)
        first, second = stage.servicer.running()
        assert (first.has_begun, second.has_begun) == (True, False)
        second.hand_over()
        with pytest.raises(HandedOver, match="before it began") as caught:
            await waiting
        cause = cast(grpc.aio.AioRpcError, caught.value.__cause__)
        assert cause.code() is grpc.StatusCode.UNAVAILABLE
        assert dict(cause.trailing_metadata() or ())["fleet-error"] == "HandedOver"
        assert not first.is_asked
        first.hand_over()
        opened.set()
        with pytest.raises(HandedOver, match="after 1 steps"):
            await running
        assert len(stage.heard.checkpoints) == 1
        (seconds,) = computed
        assert 0 < seconds < 60, "of the call that had begun"
        assert not stage.servicer.running()

    run(test, script, limits=ServicerLimits(capacity=2))


def test_draining_ends_at_the_grace_time() -> None:
    gate = Gate()

    async def test(stage: Served) -> None:
        running = asyncio.create_task(stage.runner()(packets(), stage.heard.call()))
        await asyncio.to_thread(gate.entered.wait, 30)
        await stage.server.drain(0.1)
        with pytest.raises(Unavailable):
            await running
        gate.opened.set()

    run(test, gate)


async def health(channel: grpc.aio.Channel, service: str = "") -> Any:
    check: Any = channel.unary_unary(
        "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
    )
    return (await check(health_pb2.HealthCheckRequest(service=service).SerializeToString())).status


def test_closing_the_channel_is_no_cancel_of_the_task() -> None:
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

    run(test, gate)


def test_an_address_that_cannot_be_had_is_reported(tmp_path: Path) -> None:
    async def main() -> None:
        first, second = FleetServer("127.0.0.1:0"), FleetServer(f"unix:{tmp_path}/x.sock")
        for listen, words in (
            (await first.start(), "Address already in use"),
            (await second.start(), "another process listens on it"),
            ("nonsense", "an address is HOST:PORT"),
            ("127.0.0.1:65536", "an address is HOST:PORT"),
            ("no.such.host.invalid:0", "cannot listen on no.such.host.invalid"),
            (f"unix:{tmp_path}/missing/x.sock", "there is no directory"),
            (f"unix:{tmp_path}", "a file with this path exists"),
            (f"unix:{tmp_path}/{'x' * 120}", "more than 107 bytes"),
        ):
            with pytest.raises(FailedPrecondition, match=words) as caught:
                await FleetServer(listen).start()
            assert caught.value.field == "listen"
            assert "\n" not in caught.value.message
        await first.drain(0)
        await second.drain(0)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("bound", "towards", "found"),
    [
        ("127.0.0.1:5", "redis://10.0.0.1:6379", "127.0.0.1:5"),
        ("unix:/x", "redis://10.0.0.1:6379", "unix:/x"),
        ("0.0.0.0:5", "redis://127.0.0.1:6379/0", "127.0.0.1:5"),
        ("[::]:5", "redis://127.0.0.1", "127.0.0.1:5"),
        ("0.0.0.0:5", "unix:///tmp/store.sock", "127.0.0.1:5"),
        ("0.0.0.0:5", "redis://no.such.host.invalid", "127.0.0.1:5"),
    ],
)
def test_a_wildcard_is_advertised_as_the_store_sees_it(bound: str, towards: str, found: str) -> None:
    assert advertised_address(bound, towards) == found


def test_nobody_there_is_unavailable() -> None:
    async def main() -> None:
        async with open_channel("127.0.0.1:1") as channel:
            contract = HostedStages("denoising", [ScriptedStage()]).contract
            with pytest.raises(Unavailable):
                await RemoteRunner(channel, "denoising", contract)(packets(), Call("r"))

    asyncio.run(main())
