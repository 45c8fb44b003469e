"""The watchdog of the device thread: stuck calls, their cancellation and loss, and slow calls."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Iterator

import pytest
from redis.asyncio import Redis

from async_tests import HANG_SECONDS, wait_until
from common.errors import InvalidInput, Unavailable
from common.logs import setup_logging
from common.rpc.watchdog import HangLimits, StepWatch, Verdict, Watchdog
from common.stage import Call
from common.state.workers import WorkerRegistry
from fleet.v1 import worker_pb2
from redis_servers import run_on_empty_store, running_server
from stage_server import StageInput, packets, served

LIMITS = HangLimits(seconds=60, mean_steps=20, exit_seconds=30)


def verdicts(watch: StepWatch, begin: int, end: int) -> list[Verdict]:
    """The verdicts of every second from `begin` to `end`."""
    return [watch.check(float(now)) for now in range(begin, end + 1)]


def test_a_call_without_a_step_for_the_bound_is_stuck_and_then_lost() -> None:
    watch = StepWatch(LIMITS, 0.0)
    assert set(verdicts(watch, 1, 2)) == {Verdict.LIVE}
    watch.step(2.0)
    assert set(verdicts(watch, 3, 62)) == {Verdict.LIVE}
    assert watch.check(63.0) is Verdict.STUCK
    assert watch.waited_seconds == 61
    watch.step(64.0)  # A step after the cancellation does not prove that the call ends.
    assert set(verdicts(watch, 64, 93)) == {Verdict.CANCELLED}
    assert watch.check(94.0) is Verdict.LOST


def test_a_call_is_not_stuck_before_its_first_step() -> None:
    watch = StepWatch(LIMITS, 0.0)
    assert set(verdicts(watch, 1, 7_200)) == {Verdict.LIVE}


def test_the_bound_of_slow_steps_is_a_multiple_of_their_mean() -> None:
    watch = StepWatch(LIMITS, 0.0)
    for step in range(1, 4):
        assert set(verdicts(watch, 100 * step - 99, 100 * step)) == {Verdict.LIVE}
        watch.step(100.0 * step)
    assert watch.allowed_seconds == 2_000
    assert set(verdicts(watch, 301, 2_300)) == {Verdict.LIVE}
    assert watch.check(2_301.0) is Verdict.STUCK


def test_time_without_checks_does_not_count() -> None:
    watch = StepWatch(LIMITS, 0.0)
    watch.step(1.0)
    assert watch.check(1.0) is Verdict.LIVE
    assert watch.check(500.0) is Verdict.LIVE  # The process was suspended.
    assert set(verdicts(watch, 501, 559)) == {Verdict.LIVE}
    assert watch.check(561.0) is Verdict.STUCK
    assert watch.check(900.0) is Verdict.CANCELLED
    assert set(verdicts(watch, 901, 929)) == {Verdict.CANCELLED}
    assert watch.check(931.0) is Verdict.LOST


@pytest.mark.parametrize("name", ["seconds", "mean_steps", "exit_seconds"])
def test_a_bound_of_0_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"hang_{name}: 0 is not more than 0") as raised:
        HangLimits(**{name: 0.0})
    assert raised.value.field == f"hang_{name}"


class StuckStage:
    """Makes two steps, then blocks until the test releases it. It ignores cancellation, as a kernel does."""

    def __init__(self) -> None:
        self.freed = threading.Event()
        self.calls: list[Call] = []

    def __call__(self, _: StageInput, call: Call) -> None:
        self.calls.append(call)
        call.progress(1, 3)
        call.progress(2, 3)
        assert self.freed.wait(HANG_SECONDS)


@pytest.fixture
def stage() -> Iterator[StuckStage]:
    made = StuckStage()
    yield made
    made.freed.set()


def test_a_stuck_call_is_cancelled_and_fails_and_then_is_reported_as_lost(stage: StuckStage) -> None:
    out = io.StringIO()
    setup_logging("denoising", form="json", stream=out)
    lost: list[str] = []
    is_lost = threading.Event()

    def on_lost(reason: str) -> None:
        lost.append(reason)
        is_lost.set()

    watchdog = Watchdog(HangLimits(seconds=0.05, mean_steps=1, exit_seconds=0.05), on_lost=on_lost)

    async def scenario() -> None:
        async with asyncio.timeout(HANG_SECONDS), served(stage, watchdog=watchdog) as fleet:
            with pytest.raises(Unavailable, match=r"no step for \d+\.\d s: its device is stuck"):
                await fleet.runner()(packets(8), fleet.recorded.call())
            assert fleet.recorded.progress == [(1, 3), (2, 3)]
            assert stage.calls[0].cancelled.is_set()
            assert watchdog.is_stuck
            with pytest.raises(Unavailable, match="retry on another worker"):
                await fleet.runner()(packets(8), fleet.recorded.call())
            assert len(stage.calls) == 1
            assert await asyncio.to_thread(is_lost.wait, 20)
            stage.freed.set()

            async def is_free() -> bool:
                return not watchdog.is_stuck

            await wait_until(is_free)
            assert await fleet.runner()(packets(8), fleet.recorded.call())

    asyncio.run(scenario())
    assert "after request r1 was cancelled; this process exits" in lost[0]
    (line,) = [each for each in map(json.loads, out.getvalue().splitlines()) if each["event"] == "call cancelled"]
    assert line["reason"].startswith("the stage has reported no step for ")
    assert line["request_id"] == "r1", "the watchdog's thread has no request in its context"
    assert "wait" in line["at"]
    assert "wait" in lost[0].rpartition("at=")[2]


def test_a_worker_whose_device_is_stuck_sends_no_heartbeats() -> None:
    async def scenario(redis: Redis) -> None:
        registry = WorkerRegistry(redis, heartbeat_seconds=0.01, ttl_seconds=0.1)
        info = worker_pb2.WorkerInfo(worker_id="w", service="denoising", model="m", capacity=1)
        able = True
        await registry.announce(info, is_able=lambda: able)

        async def is_live() -> bool:
            return bool(await registry.live("m", "denoising"))

        async def is_expired() -> bool:
            return not await is_live()

        await redis.delete("fleet:worker:w")
        await wait_until(is_live)  # by the next heartbeat
        able = False
        await wait_until(is_expired)
        able = True
        await wait_until(is_live)
        await registry.withdraw("w")

    with running_server("valkey") as server:
        run_on_empty_store(server.url, scenario)
