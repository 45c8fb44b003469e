"""The clients of a chaos run: each wants one picture, and asks coordinator after coordinator until it has it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import grpc
from chaos_plan import Manner, Order
from chaos_processes import Fleet, credentials
from google.protobuf.timestamp_pb2 import Timestamp

from common.errors import Cancelled, DeadlineExceeded, FleetError, InvalidInput, Unavailable
from common.rpc.options import CHANNEL_OPTIONS
from common.rpc.status import from_rpc_error
from common.state.records import is_terminal
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc

T = TypeVar("T")
Stub: TypeAlias = "generation_pb2_grpc.GenerationServiceAsyncStub"

_CALL_SECONDS = 6.0
_SILENCE_SECONDS = 6.0
_PAUSE_SECONDS = 0.1
# A frozen coordinator is noticed sooner than a client of the command line needs to.
_OPTIONS = (
    *(option for option in CHANNEL_OPTIONS if "keepalive_t" not in option[0]),
    ("grpc.keepalive_time_ms", 1_500),
    ("grpc.keepalive_timeout_ms", 1_500),
)
_AGAIN = (Unavailable, DeadlineExceeded, Cancelled)


class Wrong(Exception):
    """A client was answered with what no fault explains."""


class Channels:
    """A channel to each coordinator that was ever asked."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def stub(self, target: str) -> Stub:
        """The public API at a target."""
        if target not in self._channels:
            self._channels[target] = grpc.aio.insecure_channel(target, options=_OPTIONS)
        return generation_pb2_grpc.GenerationServiceStub(self._channels[target])

    async def close(self) -> None:
        """Close all."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()


class Pulse:
    """How far the run has come: orders that have ended, events that were heard. Faults strike by it, never by time."""

    def __init__(self) -> None:
        self.orders = 0
        self.events = 0
        self.beaten = time.monotonic()
        self._moved = asyncio.Event()
        self._is_over = False

    def event(self) -> None:
        """A client has heard an event."""
        self.events += 1
        self._move()

    def order(self) -> None:
        """A client has what it wanted."""
        self.orders += 1
        self._move()

    def end(self) -> None:
        """There is nothing more to wait for."""
        self._is_over = True
        self._move()

    async def over(self) -> None:
        """Wait until there is nothing more to wait for."""
        while not self._is_over:
            await self._moved.wait()

    def _move(self) -> None:
        self.beaten = time.monotonic()
        self._moved.set()
        self._moved = asyncio.Event()

    async def reach(self, orders: int, events: int) -> None:
        """Wait for so many orders, and then for so many more events."""
        while self.orders < orders and not self._is_over:
            await self._moved.wait()
        until = self.events + events
        while self.events < until and not self._is_over:
            await self._moved.wait()


@dataclass
class Outcome:
    """What a client has been through. `lost_answers` are submissions without a key that it knows nothing of."""

    order: Order
    request_id: str = ""
    heard: list[pb.Event] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)
    state: pb.RequestState.ValueType = pb.REQUEST_STATE_UNSPECIFIED
    gave_up: bool = False
    lost_answers: int = 0
    asked_again: int = 0


class Client:
    """Sees one order through."""

    def __init__(self, order: Order, fleet: Fleet, channels: Channels, pulse: Pulse, seed: int) -> None:
        self.outcome = Outcome(order)
        self._order = order
        self._fleet = fleet
        self._channels = channels
        self._pulse = pulse
        self._key = credentials(order.caller)
        self._deadline: Timestamp | None = None
        self._rng = random.Random(f"client {order.number} of {seed}")

    async def run(self) -> None:
        """Submit, follow, download, as the order says. Raises Wrong."""
        if self._order.deadline_seconds is not None:
            self._deadline = Timestamp()
            self._deadline.FromMilliseconds(int((time.time() + self._order.deadline_seconds) * 1_000))
        if self._order.manner in (Manner.GENERATE, Manner.LEAVE):
            await self._generate()
            if self.outcome.gave_up or is_terminal(self.outcome.state):
                return
        if not self.outcome.request_id:
            self.outcome.request_id = await self._submit()
        if self.outcome.request_id:
            await self._see_through()

    async def _see_through(self) -> None:
        """Follow and download what was accepted."""
        await self._follow()
        if self.outcome.state == pb.REQUEST_STATE_SUCCEEDED:
            await self._again("downloads", self._download)
        if self._order.manner is Manner.TWICE and (again := await self._submit()) != self.outcome.request_id:
            raise Wrong(f"request {self.outcome.request_id} has ended, and its idempotency key became {again}")

    def _request(self) -> pb.SubmitRequest:
        keyless = self._order.manner in (Manner.SUBMIT, Manner.LEAVE)
        return pb.SubmitRequest(
            model=self._order.picture.model,
            parameters=self._order.picture.parameters,
            idempotency_key="" if keyless else f"order {self._order.number}",
            priority=self._order.priority,
            deadline=self._deadline,
        )

    def _any_stub(self) -> Stub:
        coordinators = self._fleet.of(coordinators=True)
        if not coordinators:
            raise Unavailable("there is no coordinator at the moment")
        return self._channels.stub(self._rng.choice(coordinators).target)

    async def _again(self, what: str, attempt: Callable[[Stub], Awaitable[T]]) -> T:
        """Ask one coordinator after the other until one answers. Raises Wrong for an error that is none of theirs."""
        while True:
            try:
                return await attempt(self._any_stub())
            except grpc.aio.AioRpcError as error:
                reason = from_rpc_error(error)
                if not isinstance(reason, _AGAIN):
                    raise self._wrong(what, reason) from error
            except Unavailable:
                pass
            self.outcome.asked_again += 1
            await asyncio.sleep(_PAUSE_SECONDS)

    def _wrong(self, what: str, error: FleetError) -> Wrong:
        name = self.outcome.request_id or "not accepted yet"
        kind = type(error).__name__
        return Wrong(f"order {self._order.number} (request {name}) {what} and is told {kind}: {error.message}")

    async def _submit(self) -> str:
        """The request's id; empty where its deadline has passed before it was accepted."""
        request = self._request()
        times = 3 if self._order.manner is Manner.TWICE else 1

        async def once(stub: Stub) -> str:
            try:
                return (await stub.Submit(request, timeout=_CALL_SECONDS, metadata=self._key)).request.request_id
            except grpc.aio.AioRpcError as error:
                if self._is_late(error):
                    self.outcome.gave_up = True
                    return ""
                self.outcome.lost_answers += not request.idempotency_key
                raise

        names = set(await asyncio.gather(*(self._again("submits", once) for _ in range(times))))
        if len(names) != 1:
            raise Wrong(f"order {self._order.number} has one idempotency key and became {sorted(names)}")
        return names.pop()

    def _is_late(self, error: grpc.aio.AioRpcError) -> bool:
        reason = from_rpc_error(error)
        is_hurried = self._order.manner is Manner.HURRY
        return is_hurried and isinstance(reason, InvalidInput) and reason.field == "deadline"

    async def _generate(self) -> None:
        """All in one stream; what is missing when it breaks off is left to the other calls."""
        outcome = self.outcome
        with suppress(Unavailable, grpc.aio.AioRpcError):
            call = self._any_stub().Generate(pb.GenerateRequest(request=self._request()), metadata=self._key)
            try:
                async for reply in _unless_silent(call):
                    match reply.WhichOneof("payload"):
                        case "accepted":
                            outcome.request_id = reply.accepted.request_id
                        case "event":
                            self._hear(reply.event)
                            if outcome.gave_up:
                                return
                        case "file":
                            outcome.files.append(b"")
                        case "data":
                            outcome.files[-1] += reply.data
                return
            finally:
                call.cancel()
        outcome.lost_answers += self._order.manner is Manner.LEAVE
        outcome.gave_up = self._order.manner is Manner.LEAVE
        outcome.files.clear()
        if not outcome.gave_up and is_terminal(outcome.state):
            await self._again("downloads", self._download)

    def _hear(self, event: pb.Event) -> None:
        self._pulse.event()
        self.outcome.heard.append(event)
        self.outcome.state = event.state_change.state or self.outcome.state
        is_there = event.progress.service == "denoising" and event.progress.step >= self._order.at_step
        self.outcome.gave_up |= is_there and self._order.manner is Manner.LEAVE

    async def _follow(self) -> None:
        """Hear every event once, to the last, whichever coordinator tells it; cancel on the way if that is wanted."""

        async def watch(stub: Stub) -> None:
            heard = self.outcome.heard
            after = heard[-1].event_id if heard else ""
            wanted = pb.WatchRequest(request_id=self.outcome.request_id, after_event_id=after)
            call = stub.Watch(wanted, metadata=self._key)
            try:
                async for reply in _unless_silent(call):
                    self._hear(reply.event)
                    step = reply.event.progress.step
                    if self._order.manner is Manner.CANCEL and not self.outcome.gave_up and step >= self._order.at_step:
                        self.outcome.gave_up = True
                        await self._again("cancels", self._cancel)
            finally:
                call.cancel()
            if not is_terminal(self.outcome.state):
                raise Wrong(f"the watch of request {self.outcome.request_id} ends before the request")

        await self._again("watches", watch)

    async def _cancel(self, stub: Stub) -> None:
        unwanted = pb.CancelRequestRequest(request_id=self.outcome.request_id)
        await stub.CancelRequest(unwanted, timeout=_CALL_SECONDS, metadata=self._key)

    async def _download(self, stub: Stub) -> None:
        self.outcome.files = await download(stub, self._order.caller, self.outcome.request_id)


async def download(stub: Stub, caller: str, request_id: str) -> list[bytes]:
    """The stored files of a request of a caller's."""
    files: list[bytes] = []
    call = stub.DownloadResult(pb.DownloadResultRequest(request_id=request_id), metadata=credentials(caller))
    try:
        async for reply in _unless_silent(call):
            if reply.WhichOneof("payload") == "file":
                files.append(b"")
            else:
                files[-1] += reply.data
    finally:
        call.cancel()
    return files


async def _unless_silent(call: Any) -> AsyncIterator[Any]:
    """The replies of a call. Raises Unavailable after a silence, so that another coordinator is asked."""
    async with aclosing(aiter(call)) as replies:
        while True:
            try:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    reply = await anext(replies, None)
            except TimeoutError:
                raise Unavailable("nothing was heard for a while") from None
            if reply is None:
                return
            yield reply
