"""Clients of a chaos run. Each completes one request, with retries at random coordinators."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import grpc
from chaos_plan import Behavior, Order
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
# Detects a stopped coordinator sooner than the command-line client does.
_OPTIONS = (
    *(option for option in CHANNEL_OPTIONS if "keepalive_t" not in option[0]),
    ("grpc.keepalive_time_ms", 1_500),
    ("grpc.keepalive_timeout_ms", 1_500),
)
_RETRIED_ERRORS = (Unavailable, DeadlineExceeded, Cancelled)


class UnexpectedReply(Exception):
    """A client received a reply that no fault explains."""


class Channels:
    """Channels to coordinators, opened on first use."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def stub(self, target: str) -> Stub:
        """A stub of the public API at a target."""
        if target not in self._channels:
            self._channels[target] = grpc.aio.insecure_channel(target, options=_OPTIONS)
        return generation_pb2_grpc.GenerationServiceStub(self._channels[target])

    async def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()


class RunProgress:
    """Ended orders and received events of the run. This progress, and not time, triggers the faults of a plan."""

    def __init__(self) -> None:
        self.orders = 0
        self.events = 0
        self.last_moved = time.monotonic()
        self._moved = asyncio.Event()
        self._is_over = False

    def event(self) -> None:
        """Count a received event."""
        self.events += 1
        self._move()

    def order(self) -> None:
        """Count a completed order."""
        self.orders += 1
        self._move()

    def end(self) -> None:
        """End the run."""
        self._is_over = True
        self._move()

    async def over(self) -> None:
        """Wait for the end of the run."""
        while not self._is_over:
            await self._moved.wait()

    def _move(self) -> None:
        self.last_moved = time.monotonic()
        self._moved.set()
        self._moved = asyncio.Event()

    async def reach(self, orders: int, events: int) -> None:
        """Wait for `orders` orders, and then for `events` further events."""
        while self.orders < orders and not self._is_over:
            await self._moved.wait()
        until = self.events + events
        while self.events < until and not self._is_over:
            await self._moved.wait()


@dataclass
class Outcome:
    """Result of one client. `retries` counts repeated calls.

    `lost_replies` is the maximum number of accepted requests whose id the client did not receive. Only a submission
    without an idempotency key can create such a request.
    """

    order: Order
    request_id: str = ""
    received: list[pb.Event] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)
    state: pb.RequestState.ValueType = pb.REQUEST_STATE_UNSPECIFIED
    gave_up: bool = False
    lost_replies: int = 0
    retries: int = 0


class Client:
    """Completes one order."""

    def __init__(self, order: Order, fleet: Fleet, channels: Channels, run_progress: RunProgress, seed: int) -> None:
        self.outcome = Outcome(order)
        self._order = order
        self._fleet = fleet
        self._channels = channels
        self._run_progress = run_progress
        self._key = credentials(order.caller)
        self._deadline: Timestamp | None = None
        self._rng = random.Random(f"client {order.number} of {seed}")

    async def run(self) -> None:
        """Submit, follow and download as the order specifies. Raises UnexpectedReply."""
        if self._order.deadline_seconds is not None:
            self._deadline = Timestamp()
            self._deadline.FromMilliseconds(int((time.time() + self._order.deadline_seconds) * 1_000))
        if self._order.behavior in (Behavior.GENERATE, Behavior.LEAVE):
            await self._generate()
            if self.outcome.gave_up or is_terminal(self.outcome.state):
                return
        if not self.outcome.request_id:
            self.outcome.request_id = await self._submit()
        if self.outcome.request_id:
            await self._complete()

    async def _complete(self) -> None:
        """Follow and download the accepted request."""
        await self._follow()
        if self.outcome.state == pb.REQUEST_STATE_SUCCEEDED:
            await self._retry("DownloadResult", self._download)
        if self._order.behavior is Behavior.TWICE and (again := await self._submit()) != self.outcome.request_id:
            raise UnexpectedReply(
                f"the idempotency key of the ended request {self.outcome.request_id} was accepted as request {again}"
            )

    def _request(self) -> pb.SubmitRequest:
        keyless = self._order.behavior in (Behavior.SUBMIT, Behavior.LEAVE)
        return pb.SubmitRequest(
            model=self._order.media_request.model,
            parameters=self._order.media_request.parameters,
            idempotency_key="" if keyless else f"order {self._order.number}",
            priority=self._order.priority,
            deadline=self._deadline,
        )

    def _any_stub(self) -> Stub:
        coordinators = self._fleet.of(coordinators=True)
        if not coordinators:
            raise Unavailable("no coordinator is running")
        return self._channels.stub(self._rng.choice(coordinators).target)

    async def _retry(self, rpc: str, attempt: Callable[[Stub], Awaitable[T]]) -> T:
        """Retry a call at random coordinators. Raises UnexpectedReply for an error that no fault explains."""
        while True:
            try:
                return await attempt(self._any_stub())
            except grpc.aio.AioRpcError as error:
                reason = from_rpc_error(error)
                if not isinstance(reason, _RETRIED_ERRORS):
                    raise self._unexpected(rpc, reason) from error
            except Unavailable:
                pass
            self.outcome.retries += 1
            await asyncio.sleep(_PAUSE_SECONDS)

    def _unexpected(self, rpc: str, error: FleetError) -> UnexpectedReply:
        request = f"request {self.outcome.request_id}" if self.outcome.request_id else "not accepted yet"
        kind = type(error).__name__
        return UnexpectedReply(f"{rpc} of order {self._order.number} ({request}) failed with {kind}: {error.message}")

    async def _submit(self) -> str:
        """Submit; returns the request id, or "" if the deadline passed before acceptance."""
        request = self._request()
        times = 3 if self._order.behavior is Behavior.TWICE else 1

        async def once(stub: Stub) -> str:
            try:
                return (await stub.Submit(request, timeout=_CALL_SECONDS, metadata=self._key)).request.request_id
            except grpc.aio.AioRpcError as error:
                if self._is_late(error):
                    self.outcome.gave_up = True
                    return ""
                self.outcome.lost_replies += not request.idempotency_key
                raise

        names = set(await asyncio.gather(*(self._retry("Submit", once) for _ in range(times))))
        if len(names) != 1:
            raise UnexpectedReply(
                f"order {self._order.number} has one idempotency key, but was accepted as the requests {sorted(names)}"
            )
        return names.pop()

    def _is_late(self, error: grpc.aio.AioRpcError) -> bool:
        reason = from_rpc_error(error)
        is_hurried = self._order.behavior is Behavior.HURRY
        return is_hurried and isinstance(reason, InvalidInput) and reason.field == "deadline"

    async def _generate(self) -> None:
        """Submit, follow and download in one Generate call.

        After a disconnect, other RPCs continue the order, except for behavior LEAVE, which gives up.
        """
        outcome = self.outcome
        with suppress(Unavailable, grpc.aio.AioRpcError):
            call = self._any_stub().Generate(pb.GenerateRequest(request=self._request()), metadata=self._key)
            try:
                async for reply in _unless_silent(call):
                    match reply.WhichOneof("payload"):
                        case "accepted":
                            outcome.request_id = reply.accepted.request_id
                        case "event":
                            self._record(reply.event)
                            if outcome.gave_up:
                                return
                        case "file":
                            outcome.files.append(b"")
                        case "data":
                            outcome.files[-1] += reply.data
                return
            finally:
                call.cancel()
        outcome.lost_replies += self._order.behavior is Behavior.LEAVE
        outcome.gave_up = self._order.behavior is Behavior.LEAVE
        outcome.files.clear()
        if not outcome.gave_up and is_terminal(outcome.state):
            await self._retry("DownloadResult", self._download)

    def _record(self, event: pb.Event) -> None:
        self._run_progress.event()
        self.outcome.received.append(event)
        self.outcome.state = event.state_change.state or self.outcome.state
        has_reached_step = event.progress.service == "denoising" and event.progress.step >= self._order.at_step
        self.outcome.gave_up |= has_reached_step and self._order.behavior is Behavior.LEAVE

    async def _follow(self) -> None:
        """Receive every event once, from any coordinator; cancel meanwhile if the order requires it."""

        async def watch(stub: Stub) -> None:
            received = self.outcome.received
            after = received[-1].event_id if received else ""
            request = pb.WatchRequest(request_id=self.outcome.request_id, after_event_id=after)
            call = stub.Watch(request, metadata=self._key)
            try:
                async for reply in _unless_silent(call):
                    self._record(reply.event)
                    step = reply.event.progress.step
                    if (
                        self._order.behavior is Behavior.CANCEL
                        and not self.outcome.gave_up
                        and step >= self._order.at_step
                    ):
                        self.outcome.gave_up = True
                        await self._retry("CancelRequest", self._cancel)
            finally:
                call.cancel()
            if not is_terminal(self.outcome.state):
                raise UnexpectedReply(f"Watch ended before request {self.outcome.request_id}")

        await self._retry("Watch", watch)

    async def _cancel(self, stub: Stub) -> None:
        request = pb.CancelRequestRequest(request_id=self.outcome.request_id)
        await stub.CancelRequest(request, timeout=_CALL_SECONDS, metadata=self._key)

    async def _download(self, stub: Stub) -> None:
        self.outcome.files = await download(stub, self._order.caller, self.outcome.request_id)


async def download(stub: Stub, caller: str, request_id: str) -> list[bytes]:
    """Download the stored files of a caller's request."""
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
    """Iterate over the replies of a call. Raises Unavailable after a silence, so that the call is retried elsewhere."""
    async with aclosing(aiter(call)) as replies:
        while True:
            try:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    reply = await anext(replies, None)
            except TimeoutError:
                raise Unavailable(f"no message was received for {_SILENCE_SECONDS:g} s") from None
            if reply is None:
                return
            yield reply
