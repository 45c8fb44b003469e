"""Faults during a streamed video. Real processes serve causal Wan; a client follows the file and the events."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import grpc
from chaos_processes import Process

from async_tests import HANG_SECONDS, wait_until
from coordinator_fleet import Stub
from fleet.v1 import artifacts_pb2 as pb_artifacts
from fleet.v1 import generation_pb2 as pb
from late_faults import FaultTooLate
from resume_fleet import Family, Served
from tiny_wan import build_tiny_wan_causal

BLOCKS = 4
"""Blocks of the video."""
STEPS = 10
"""Denoising steps per block: enough that a fault hits the running loop."""
WITHIN = STEPS + STEPS // 2
"""Step of a fault within the second block."""
BETWEEN = 2 * STEPS
"""Step of a fault at the end of the second block."""
TIMESTEPS = pb_artifacts.DoubleList(values=range(1000, 1000 - STEPS * 50, -50))
CAUSAL = Family(
    "causal",
    {
        "height": 128,
        "width": 192,
        "num_frames": 8 * BLOCKS - 3,
        "num_inference_steps": STEPS,
        "params": {"dmd_denoising_steps": pb_artifacts.ParamValue(doubles_value=TIMESTEPS)},
    },
    b"\x00\x00\x00",
    build_tiny_wan_causal,
)


@dataclass
class FollowedRequest:
    """A request as a client received it: bytes of the growing file, result items and denoising steps."""

    data: bytes = b""
    items: list[pb.ResultItem] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    connections: int = 0

    @property
    def resumed_steps(self) -> list[int]:
        """Steps of the second worker; empty if there was none."""
        return self.steps[self.steps.index(0, 1) + 1 :] if self.steps.count(0) > 1 else []

    def check(self, whole: bytes) -> None:
        """Assert that every byte and every item was received exactly once."""
        assert self.data == whole
        assert [item.item_index for item in self.items] == list(range(BLOCKS))
        ends = [item.offset + item.byte_size for item in self.items]
        assert [item.offset for item in self.items] == [0, *ends[:-1]]
        assert ends[-1] == len(whole)


async def follow_file(stubs: Sequence[Stub], name: str, followed: FollowedRequest) -> None:
    """Follow the growing file; after a disconnect, continue at the next coordinator."""
    while True:
        stub = stubs[followed.connections % len(stubs)]
        followed.connections += 1
        request = pb.DownloadResultRequest(request_id=name, index=0, follow=True, offset=len(followed.data))
        try:
            async for reply in stub.DownloadResult(request):
                if reply.HasField("file_data"):
                    assert reply.file_data.offset == len(followed.data), "a byte was repeated or skipped"
                    followed.data += reply.file_data.data
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            await asyncio.sleep(0.1)
        else:
            return


async def watch(
    stubs: Sequence[Stub], name: str, followed: FollowedRequest, act: Callable[[FollowedRequest], Awaitable[bool]]
) -> None:
    """Watch the events to the end; `act` is called after each event until it returns True.

    After a disconnect, the watch continues at the next coordinator.
    """
    last, acted, turn = "", False, 0
    while True:
        try:
            async for reply in stubs[turn].Watch(pb.WatchRequest(request_id=name, after_event_id=last)):
                event = reply.event
                last = event.event_id
                if event.HasField("item"):
                    followed.items.append(event.item)
                if event.progress.service == "denoising":
                    followed.steps.append(event.progress.step)
                acted = acted or await act(followed)
                if event.state_change.state >= pb.REQUEST_STATE_SUCCEEDED:
                    assert event.state_change.state == pb.REQUEST_STATE_SUCCEEDED, event
                    if not acted:
                        raise FaultTooLate("the request ended before the fault")
                    return
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            turn = (turn + 1) % len(stubs)
            await asyncio.sleep(0.1)


async def run(
    fleet: Served, stubs: Sequence[Stub], act: Callable[[str, FollowedRequest], Awaitable[bool]]
) -> FollowedRequest:
    """Run one request with a fault; follows both the file and the events."""
    name, followed = await fleet.submit(stubs[0]), FollowedRequest()
    await asyncio.gather(follow_file(stubs, name, followed), watch(stubs, name, followed, partial(act, name)))
    assert not await fleet.redis.keys("fleet:checkpoint:*")
    return followed


async def nothing(_: str, __: FollowedRequest) -> bool:
    return True


def at(
    step: int, items: int, inject: Callable[[], Awaitable[None]]
) -> Callable[[str, FollowedRequest], Awaitable[bool]]:
    """Call `inject` once, after `step` steps are done and `items` items are delivered."""

    async def act(_: str, followed: FollowedRequest) -> bool:
        if max(followed.steps, default=0) < step or len(followed.items) < items:
            return False
        await inject()
        return True

    return act


async def undisturbed(fleet: Served) -> bytes:
    """The file of a request without a fault."""
    followed = await run(fleet, fleet.stubs[:1], nothing)
    assert followed.data.startswith(CAUSAL.begins_with)
    followed.check(followed.data)
    return followed.data


async def worker_fault(fleet: Served, whole: bytes, service: str, number: signal.Signals, step: int) -> None:
    """Signal the worker of a service after `step` steps; a decoder only after its first delivered item."""
    await fleet.repeat_if_late(partial(_worker_fault, fleet, whole, service, number, step))


async def _worker_fault(fleet: Served, whole: bytes, service: str, number: signal.Signals, step: int) -> None:
    signaled: list[Process] = []

    async def inject() -> None:
        signaled.append(await fleet.signal_worker(service, number))

    followed = await run(fleet, fleet.stubs[:1], at(step, int(service == "decoding"), inject))
    followed.check(whole)
    if number is signal.SIGSTOP:
        fleet.fleet.signal(signaled[0], signal.SIGCONT)
    if service == "denoising" and not followed.resumed_steps:
        raise FaultTooLate("the loop had ended")
    assert service == "denoising" or not followed.resumed_steps, followed.steps
    assert not followed.resumed_steps or min(followed.resumed_steps) > step // STEPS * STEPS, followed.steps


async def handed_over(fleet: Served, whole: bytes) -> None:
    """Send SIGTERM to the denoiser in its second block: no step is repeated, no item is delivered twice."""
    await fleet.repeat_if_late(partial(_handed_over, fleet, whole))


async def _handed_over(fleet: Served, whole: bytes) -> None:
    async def inject() -> None:
        await fleet.signal_worker("denoising", signal.SIGTERM)

    followed = await run(fleet, fleet.stubs[:1], at(WITHIN, 0, inject))
    followed.check(whole)
    if not followed.resumed_steps:
        raise FaultTooLate("the loop had ended")
    done = [step for step in followed.steps if step]
    assert done == sorted(set(done)), followed.steps


async def slow_follower(fleet: Served, whole: bytes) -> None:
    """A follower that stops reading for a while does not block the request, and receives the whole file."""
    stub = fleet.stubs[0]
    name = await fleet.submit(stub)
    follow = aiter(stub.DownloadResult(pb.DownloadResultRequest(request_id=name, index=0, follow=True)))
    data = [(await anext(follow)).file_data.data]
    async for reply in stub.Watch(pb.WatchRequest(request_id=name)):
        last = reply.event.state_change
    assert last.state == pb.REQUEST_STATE_SUCCEEDED, last
    data += [reply.file_data.data async for reply in follow]
    assert b"".join(data) == whole


async def expired(fleet: Served) -> None:
    """A deadline that passes during the stream ends the request as expired and frees its workers."""
    await fleet.repeat_if_late(partial(_expired, fleet))


async def _expired(fleet: Served) -> None:
    stub = fleet.stubs[0]
    name = await fleet.submit(stub, seconds=1.0)
    async for reply in stub.Watch(pb.WatchRequest(request_id=name)):
        last = reply.event.state_change
    assert last.state == pb.REQUEST_STATE_EXPIRED, last
    await wait_until_released(fleet, name)


async def cancelled(fleet: Served) -> None:
    """Cancelling a request in its second block skips its other steps and frees both workers; its items expire."""
    await fleet.repeat_if_late(partial(_cancelled, fleet))


async def _cancelled(fleet: Served) -> None:
    stub = fleet.stubs[0]
    name, is_sent = await fleet.submit(stub), False
    async for reply in stub.Watch(pb.WatchRequest(request_id=name)):
        event = reply.event
        if event.progress.service == "denoising" and event.progress.step > STEPS and not is_sent:
            is_sent = True
            await stub.CancelRequest(pb.CancelRequestRequest(request_id=name))
        last = event.state_change
    if last.state == pb.REQUEST_STATE_SUCCEEDED:
        raise FaultTooLate("the request succeeded before it was cancelled")
    assert last.state == pb.REQUEST_STATE_CANCELLED, last
    if last.steps_saved == 0:
        raise FaultTooLate("the loop had ended")
    assert 0 < last.steps_saved < BLOCKS * STEPS, last
    await wait_until_released(fleet, name)


async def wait_until_released(fleet: Served, name: str) -> None:
    """Wait until no worker runs the ended request; asserts that its remaining store keys expire."""

    async def remains() -> list[str]:
        slots = {key: await fleet.redis.hgetall(key) for key in await fleet.redis.keys("fleet:slots:*")}
        taken = [f"{key!r}: {fields}" for key, fields in slots.items() if name in str(fields)]
        return taken + [repr(key) for key in await fleet.redis.keys("fleet:checkpoint:*")]

    async def is_free() -> bool:
        return not await remains()

    try:
        async with asyncio.timeout(HANG_SECONDS / 2):
            await wait_until(is_free)
    except TimeoutError:
        raise AssertionError(f"request {name} has ended; remaining: {await remains()}") from None
    for key in await fleet.redis.keys(f"fleet:*{name}*"):
        assert await fleet.redis.pttl(key) > 0, f"{key!r} has no TTL"


async def coordinator_fault(fleet: Served, whole: bytes, number: signal.Signals, step: int) -> None:
    """Signal the second coordinator, which runs the request, after `step` steps and the first item."""
    await fleet.repeat_if_late(partial(_coordinator_fault, fleet, whole, number, step))


async def _coordinator_fault(fleet: Served, whole: bytes, number: signal.Signals, step: int) -> None:
    coordinator = fleet.fleet.of(coordinators=True)[1]

    async def inject() -> None:
        fleet.fleet.signal(coordinator, number)

    followed = await run(fleet, [fleet.stubs[1], fleet.stubs[0]], at(step, 1, inject))
    followed.check(whole)
    if followed.connections == 1:
        fleet.fleet.signal(coordinator, signal.SIGCONT)
        raise FaultTooLate("the coordinator had sent the whole file")
    if followed.resumed_steps:
        assert min(followed.resumed_steps) > step // STEPS * STEPS, followed.steps
