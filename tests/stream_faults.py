"""Faults while a video streams: real processes of causal Wan, and a client that follows the file and the events."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import grpc
from chaos_processes import Process

from async_tests import wait_until
from coordinator_fleet import Stub
from fleet.v1 import artifacts_pb2 as pb_artifacts
from fleet.v1 import generation_pb2 as pb
from resume_fleet import Family, Served, TooLate
from tiny_wan import build_tiny_wan_causal

BLOCKS, STEPS = 4, 10
"""Blocks of the video, and denoising steps of a block: so many that a fault hits the loop while it runs."""
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


MOST_REPEATS = 5


@dataclass
class Followed:
    """What a client heard of a request: the bytes of the file as it grew, its items, and the steps of the loop."""

    data: bytes = b""
    items: list[pb.ResultItem] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    connections: int = 0

    @property
    def resumed_steps(self) -> list[int]:
        """The steps that a second worker did."""
        return self.steps[self.steps.index(0, 1) + 1 :] if self.steps.count(0) > 1 else []

    def check(self, whole: bytes) -> None:
        """Assert that every byte and every item came once."""
        assert self.data == whole
        assert [item.item_index for item in self.items] == list(range(BLOCKS))
        ends = [item.offset + item.byte_size for item in self.items]
        assert [item.offset for item in self.items] == [0, *ends[:-1]]
        assert ends[-1] == len(whole)


async def follow_file(stubs: Sequence[Stub], name: str, heard: Followed) -> None:
    """Follow the file as it grows, at the next coordinator where one goes away."""
    while True:
        stub = stubs[heard.connections % len(stubs)]
        heard.connections += 1
        request = pb.DownloadResultRequest(request_id=name, index=0, follow=True, offset=len(heard.data))
        try:
            async for reply in stub.DownloadResult(request):
                if reply.HasField("file_data"):
                    assert reply.file_data.offset == len(heard.data), "a byte twice, or none"
                    heard.data += reply.file_data.data
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            await asyncio.sleep(0.1)
        else:
            return


async def watch(stubs: Sequence[Stub], name: str, heard: Followed, act: Callable[[Followed], Awaitable[bool]]) -> None:
    """Hear the events to the end; `act` is called after each until it has acted."""
    last, acted, turn = "", False, 0
    while True:
        try:
            async for reply in stubs[turn].Watch(pb.WatchRequest(request_id=name, after_event_id=last)):
                event = reply.event
                last = event.event_id
                if event.HasField("item"):
                    heard.items.append(event.item)
                if event.progress.service == "denoising":
                    heard.steps.append(event.progress.step)
                acted = acted or await act(heard)
                if event.state_change.state >= pb.REQUEST_STATE_SUCCEEDED:
                    assert event.state_change.state == pb.REQUEST_STATE_SUCCEEDED, event
                    assert acted, "the request ended before the fault"
                    return
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            turn = (turn + 1) % len(stubs)
            await asyncio.sleep(0.1)


async def run(fleet: Served, stubs: Sequence[Stub], act: Callable[[str, Followed], Awaitable[bool]]) -> Followed:
    """One request, followed in both ways, with a fault."""
    name, heard = await fleet.submit(stubs[0]), Followed()
    await asyncio.gather(follow_file(stubs, name, heard), watch(stubs, name, heard, partial(act, name)))
    assert not await fleet.redis.keys("fleet:checkpoint:*")
    return heard


async def nothing(_: str, __: Followed) -> bool:
    return True


def at(step: int, items: int, strike: Callable[[], Awaitable[None]]) -> Callable[[str, Followed], Awaitable[bool]]:
    """Strike once so many steps are done and so many items are delivered."""

    async def act(_: str, heard: Followed) -> bool:
        if max(heard.steps, default=0) < step or len(heard.items) < items:
            return False
        await strike()
        return True

    return act


async def undisturbed(fleet: Served) -> bytes:
    """The file of a request without a fault."""
    heard = await run(fleet, fleet.stubs[:1], nothing)
    assert heard.data.startswith(CAUSAL.begins_with)
    heard.check(heard.data)
    return heard.data


async def worker_fault(fleet: Served, whole: bytes, service: str, number: signal.Signals, step: int) -> None:
    """Strike the worker of a service once so many steps are done. A decoder is struck with an item delivered.

    The case is repeated where the strike came after the work: the events of a busy machine are late.
    """
    for _ in range(MOST_REPEATS):
        try:
            return await _worker_fault(fleet, whole, service, number, step)
        except TooLate:
            continue
    raise TooLate(f"{service} was never struck during a request in {MOST_REPEATS} tries")


async def _worker_fault(fleet: Served, whole: bytes, service: str, number: signal.Signals, step: int) -> None:
    struck: list[Process] = []

    async def strike() -> None:
        struck.append(await fleet.signal_worker(service, number))

    heard = await run(fleet, fleet.stubs[:1], at(step, int(service == "decoding"), strike))
    heard.check(whole)
    if number is signal.SIGSTOP:
        fleet.fleet.signal(struck[0], signal.SIGCONT)
    if service == "denoising" and not heard.resumed_steps:
        raise TooLate("the loop had ended")
    assert service == "denoising" or not heard.resumed_steps, heard.steps
    assert not heard.resumed_steps or min(heard.resumed_steps) > step // STEPS * STEPS, heard.steps


async def handed_over(fleet: Served, whole: bytes) -> None:
    """SIGTERM of the denoiser within its second block: no step is repeated, and no item is delivered twice."""
    for _ in range(MOST_REPEATS):

        async def strike() -> None:
            await fleet.signal_worker("denoising", signal.SIGTERM)

        try:
            heard = await run(fleet, fleet.stubs[:1], at(WITHIN, 0, strike))
        except TooLate:
            continue
        heard.check(whole)
        if heard.resumed_steps:
            done = [step for step in heard.steps if step]
            assert done == sorted(set(done)), heard.steps
            return
    raise TooLate(f"the denoiser never left during a request in {MOST_REPEATS} tries")


async def slow_follower(fleet: Served, whole: bytes) -> None:
    """A client that follows the file and reads nothing for a while: the request ends without it, and it gets all."""
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
    """A deadline that passes while the video streams: the request ends as expired, and its workers are free."""
    stub = fleet.stubs[0]
    name = await fleet.submit(stub, seconds=1.0)
    async for reply in stub.Watch(pb.WatchRequest(request_id=name)):
        last = reply.event.state_change
    assert last.state == pb.REQUEST_STATE_EXPIRED, last
    await is_forgotten(fleet, name)


async def cancelled(fleet: Served) -> None:
    """Cancel a request within its second block: both workers are free within a step, and its items expire."""
    stub = fleet.stubs[0]
    name, asked = await fleet.submit(stub), False
    async for reply in stub.Watch(pb.WatchRequest(request_id=name)):
        event = reply.event
        if event.progress.service == "denoising" and event.progress.step > STEPS and not asked:
            asked = True
            await stub.CancelRequest(pb.CancelRequestRequest(request_id=name))
        last = event.state_change
    assert last.state == pb.REQUEST_STATE_CANCELLED, last
    assert 0 < last.steps_saved < BLOCKS * STEPS, last
    await is_forgotten(fleet, name)


async def is_forgotten(fleet: Served, name: str) -> None:
    """Wait until no worker works on a request that has ended; what the store still has of it expires."""

    async def remains() -> list[str]:
        slots = {key: await fleet.redis.hgetall(key) for key in await fleet.redis.keys("fleet:slots:*")}
        taken = [f"{key!r}: {fields}" for key, fields in slots.items() if name in str(fields)]
        return taken + [repr(key) for key in await fleet.redis.keys("fleet:checkpoint:*")]

    async def is_free() -> bool:
        return not await remains()

    try:
        async with asyncio.timeout(5):
            await wait_until(is_free)
    except TimeoutError:
        raise AssertionError(f"request {name} has ended; this remains: {await remains()}") from None
    for key in await fleet.redis.keys(f"fleet:*{name}*"):
        assert await fleet.redis.pttl(key) > 0, f"{key!r} stays for ever"


async def coordinator_fault(fleet: Served, whole: bytes, number: signal.Signals, step: int) -> None:
    """Strike the second coordinator, which runs the request, once so many steps are done and an item is delivered."""

    async def strike() -> None:
        fleet.fleet.signal(fleet.fleet.of(coordinators=True)[1], number)

    heard = await run(fleet, [fleet.stubs[1], fleet.stubs[0]], at(step, 1, strike))
    heard.check(whole)
    assert heard.connections > 1
    if heard.resumed_steps:
        assert min(heard.resumed_steps) > step // STEPS * STEPS, heard.steps


WITHIN, BETWEEN = STEPS + STEPS // 2, 2 * STEPS
"""Steps within the second block, and at its end."""
