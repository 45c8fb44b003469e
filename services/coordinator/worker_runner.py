"""Runs a service of a model on a worker that has a free slot, and on another one when that is lost.

The store chooses the worker: `dispatch` in common/state/lua/worker_slots.lua.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import grpc

from common.errors import Cancelled, FleetError, HandedOver, ResourceExhausted, Unavailable
from common.log_context import log_scope
from common.logs import get_logger
from common.metrics import (
    HANDED_OVER_CALLS,
    LOST_CALLS,
    QUEUE_WAIT_SECONDS,
    RESUMED_CALLS,
    RETRIES,
    SERVICE_SECONDS,
    STEP_CHECKPOINT_BYTES,
    STEP_CHECKPOINTS_RECEIVED,
    SUSPECTED_WORKERS,
    observe,
)
from common.pipeline import ServiceSpec
from common.rpc.client import RemoteRunner, WorkerLost
from common.rpc.framing import CallLimits, Packet
from common.stage import STEP_CHECKPOINTS, Call, Contract, ItemSink
from common.state.worker_slots import Computed, QueuePriority, WorkerSlot, WorkerSlots
from common.trace_context import NO_SPAN, Span, SpanKind
from common.tracing import span
from common.wiring import Wiring, contract_of
from fleet.v1 import worker_pb2
from services.coordinator.access import WorkerAccess
from services.coordinator.resume import Recovery, origin_of, step_of
from services.coordinator.state_lines import log_resumed

_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0
_CLOSING_SECONDS = 3_600.0  # for the calls that a worker which shuts down still finishes

_log = get_logger(__name__)


class Connections:
    """Channels to workers, opened once and kept; a worker that does not answer is connected to anew, and every one
    when the coordinator has another certificate to show.
    """

    def __init__(self, limits: CallLimits, access: WorkerAccess | None = None) -> None:
        self._limits = limits
        self._access = access or WorkerAccess()
        self._version = self._access.version
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._runners: dict[tuple[str, str, str, frozenset[str], str], RemoteRunner] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def runner(
        self, model: str, variant: str, spec: ServiceSpec, address: str, unread: Collection[str] = ()
    ) -> RemoteRunner:
        """The runner that calls a service of a model's variant at an address. Drops the outputs that are `unread`."""
        if (version := self._access.version) != self._version:
            self._version = version
            for opened in list(self._channels):
                self.drop(opened)
        key = (model, variant, spec.service, frozenset(unread), address)
        if key not in self._runners:
            if address not in self._channels:
                self._channels[address] = self._access.open(address)
            self._runners[key] = RemoteRunner(
                self._channels[address], spec.service, spec.contract, limits=self._limits, unread=unread
            )
        return self._runners[key]

    def drop(self, address: str) -> None:
        """Connect anew to an address next time; calls that are under way there go on."""
        self._runners = {key: runner for key, runner in self._runners.items() if key[-1] != address}
        channel = self._channels.pop(address, None)
        if channel is not None:
            closing = asyncio.create_task(channel.close(_CLOSING_SECONDS))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all channels."""
        for closing in self._closing:
            closing.cancel()
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
        self._runners.clear()


class ArtifactMemory:
    """Bounds the bytes of all packets that requests hold on to here."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.used_bytes = 0

    def hold(self, packets: Iterable[Packet]) -> None:
        """Count packets for as long as they live. Raises ResourceExhausted beyond the bound."""
        for packet in packets:
            size = packet.byte_size
            self.used_bytes += size
            weakref.finalize(packet, self._forget, size)
        if self.used_bytes > self._max_bytes:
            raise ResourceExhausted(
                f"artifacts of running requests take {self.used_bytes} bytes; at most {self._max_bytes} are kept"
            )

    def _forget(self, size: int) -> None:
        self.used_bytes -= size


@dataclass(frozen=True)
class Workers:
    """How this coordinator reaches workers."""

    slots: WorkerSlots
    connections: Connections
    memory: ArtifactMemory
    patience_seconds: float | None = None


@dataclass
class _Attempt:
    """A call of one worker. `begun` is whether its stages have started; `on_begin` is called when they do.

    Older workers send no Begun frame. For them `on_begin` is called at the start of the call, and a lost call counts as
    begun if the worker may have received it.
    """

    worker_slot: WorkerSlot
    on_begin: Callable[[], None]
    begun: bool = False
    steps_before: int = 0
    """The step of the checkpoint from which the worker continues."""
    steps_after: int = 0
    """The step of the newest checkpoint that the worker has sent."""
    computed: Computed | None = None
    span: Span = NO_SPAN
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if not self.worker_slot.worker.reports_begun:
            self.on_begin()

    def begin(self) -> None:
        """The worker starts the stages, or has answered from its cache."""
        if not self.begun:
            self.span.event("begun")
            if self.worker_slot.worker.reports_begun:
                self.on_begin()
        self.begun = True

    def add_computed(self, seconds: float) -> None:
        """The worker reports its compute seconds at the end."""
        self.computed = Computed(seconds, self.steps_before)

    def hand_over(self) -> None:
        """The worker has handed the call over: its compute seconds are those of the steps up to its last checkpoint."""
        if self.computed is not None:
            self.computed = replace(self.computed, steps_after=self.steps_after)

    def lose(self, error: FleetError) -> None:
        """The call was lost."""
        self.begun |= not self.worker_slot.worker.reports_begun and isinstance(error, WorkerLost)

    @property
    def seconds(self) -> float:
        """Time since the call was made."""
        return time.monotonic() - self.since


def _names(attempt: _Attempt) -> dict[str, object]:
    """The worker of an attempt, for a log line."""
    worker = attempt.worker_slot.worker
    return {"worker": worker.worker_id, "address": worker.address}


class _Place(NamedTuple):
    """A service of a model: the labels of its metrics."""

    service: str
    model: str


@dataclass(frozen=True)
class _StepCheckpoints:
    """Keeps the newest step checkpoint of an attempt."""

    attempt: _Attempt
    recovery: Recovery
    origin: str
    place: _Place

    async def put(self, index: int, item: Packet, byte_size: int) -> None:
        """Take a checkpoint."""
        del index
        STEP_CHECKPOINTS_RECEIVED.labels(*self.place).inc()
        STEP_CHECKPOINT_BYTES.labels(*self.place).inc(byte_size)
        self.attempt.steps_after = step_of(item)
        self.attempt.span.event("checkpoint", step=self.attempt.steps_after, bytes=byte_size)
        self.recovery.step_checkpoint.remember(self.origin, item)


@dataclass(frozen=True)
class _WorkerItems:
    """Gives the items of a worker's stream to their reader, once the checkpoint that came before them is stored."""

    slot: str
    sink: ItemSink
    memory: ArtifactMemory
    recovery: Recovery
    span: Span

    async def put(self, index: int, item: Packet, byte_size: int) -> None:
        """Take an item. Raises ResourceExhausted with the slot as field beyond the bound of kept artifacts."""
        await self.recovery.step_checkpoint.settle()
        try:
            self.memory.hold([item])
        except ResourceExhausted as error:
            raise ResourceExhausted(error.message, field=self.slot) from error
        self.recovery.has_emitted = True
        self.span.event("item", slot=self.slot, index=index, bytes=byte_size)
        await self.sink.put(index, item, byte_size)


class WorkerRunner:
    """One service of a model for one request: a Runner whose values are packets.

    A worker gets the values that its own contract reads, as it may be of another release than this coordinator.
    `stage` is the service's place among the request's services. `on_begin` is called each time that a worker begins.
    `tokens` is the work of one step, for the worker's metrics.
    A worker that is lost is avoided for a while, by this coordinator only, and a full one is tried again later. Raises
    Unavailable when no worker was reached for `patience_seconds`, and InternalError for a request that workers die of.
    """

    def __init__(
        self,
        workers: Workers,
        model: str,
        spec: ServiceSpec,
        stage: int,
        queue_priority: QueuePriority,
        recovery: Recovery,
        on_begin: Callable[[], None],
        *,
        wiring: Wiring,
        tokens: int = 0,
    ) -> None:
        self._workers = workers
        self._model = model
        self._place = _Place(spec.service, model)
        self._tokens = tokens
        self._spec = wiring.narrow(spec)
        self._wiring = wiring
        self._stage = stage
        self._queue_priority = queue_priority
        self._recovery = recovery
        self._on_begin = on_begin
        self._unreached_since: float | None = None
        self._warned: set[bool] = set()
        self._attempts = 0

    @property
    def contract(self) -> Contract:
        """What the service's stages read together, and write for other services or as the result."""
        return self._spec.contract

    async def __call__(self, values: Mapping[str, Any], call: Call) -> Mapping[str, Packet]:
        """Wait for a worker, run there, and give its slot back. Another worker reads a stream from its first item."""
        with log_scope(stage=self._spec.service):
            return await self._run_until_done(values, call)

    async def _run_until_done(self, values: Mapping[str, Any], call: Call) -> Mapping[str, Packet]:
        pause, began = _FIRST_PAUSE_SECONDS, time.monotonic()
        left: worker_pb2.WorkerInfo | None = None
        while True:
            self._attempts += 1
            with log_scope(attempt=self._attempts):
                attempt = _Attempt(await self._claim(call, left), self._on_begin)
                used, left = 0.0, None
                try:
                    with self._attempt_span(attempt):
                        outputs = await self._run(attempt, values, call)
                        attempt.begin()
                    used = attempt.seconds
                except HandedOver as error:
                    self._handed_over(attempt, error)
                    left = attempt.worker_slot.worker
                    continue
                except (Unavailable, Cancelled) as error:
                    attempt.lose(error)
                    await self._lost(attempt, error)
                    continue
                except ResourceExhausted as error:
                    if error.field:  # about a value, and not the worker
                        raise
                    _log.info("worker is full", **_names(attempt), error=error)
                    RETRIES.labels(*self._place, "full").inc()
                    self._unreached_since = None
                else:
                    self._workers.memory.hold(outputs.values())  # Its ResourceExhausted ends the request.
                    observe(SERVICE_SECONDS.labels(*self._place), time.monotonic() - began)
                    return outputs
                finally:
                    self._workers.slots.release(attempt.worker_slot, used, attempt.computed)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    @contextmanager
    def _attempt_span(self, attempt: _Attempt) -> Iterator[None]:
        """The span of a call of a worker, which fails with the class of the error that ends it."""
        worker, service = attempt.worker_slot.worker, self._spec.service
        _log.debug("attempt started", **_names(attempt))
        with span(
            f"attempt {service}",
            SpanKind.CLIENT,
            service=service,
            attempt=self._attempts,
            worker=worker.worker_id,
            address=worker.address,
        ) as attempt.span:
            yield
        _log.debug("attempt finished", seconds=attempt.seconds, **_names(attempt))

    async def _run(self, attempt: _Attempt, values: Mapping[str, Any], call: Call) -> Mapping[str, Packet]:
        """Run on one worker. Resumes from a step checkpoint if the result has the same bytes."""
        worker = attempt.worker_slot.worker
        announced = self._contract_of(worker)
        values = {slot: value for slot, value in values.items() if slot in announced.inputs}
        unread = announced.outputs.keys() - self._wiring.read.keys()
        runner = self._workers.connections.runner(self._model, call.variant, self._spec, worker.address, unread)
        memory, recovery = self._workers.memory, self._recovery
        sinks = {slot: _WorkerItems(slot, sink, memory, recovery, attempt.span) for slot, sink in call.sinks.items()}
        call = replace(call, on_begun=attempt.begin, on_computed=attempt.add_computed, sinks=sinks, tokens=self._tokens)
        slot = self._spec.resume_slot
        if slot is None or not worker.numerics_fingerprint or slot not in announced.inputs:
            return await runner(values, call)
        origin = origin_of(worker.numerics_fingerprint, values)
        checkpoint = await self._recovery.step_checkpoint.find(
            origin, slot, with_any_numerics=self._recovery.has_emitted
        )
        if checkpoint is not None:
            RESUMED_CALLS.labels(*self._place).inc()
            values = {**values, slot: checkpoint}
            attempt.steps_before = step_of(checkpoint)
            log_resumed(attempt.steps_before)
            attempt.span.set(resumed_at_step=attempt.steps_before)

        kept = _StepCheckpoints(attempt, self._recovery, origin, self._place)
        return await runner(values, replace(call, sinks={**sinks, STEP_CHECKPOINTS: kept}))

    def _contract_of(self, worker: worker_pb2.WorkerInfo) -> Contract:
        """What a worker reads and writes; that of this coordinator's release, if it announces nothing."""
        announced = contract_of(worker, self._wiring.variant) if worker.HasField("contract") else None
        return announced or self._spec.contract

    async def _claim(self, call: Call, left: worker_pb2.WorkerInfo | None) -> WorkerSlot:
        """Claim a slot. Waits without a bound, also while the store is unavailable. Worker `left` handed over."""
        resumes = self._spec.resume_slot is not None and self._recovery.step_checkpoint.is_known
        service = self._spec.service
        with span(f"queue {service}", service=service) as waiting:
            alone = await self._recovery.wait_until_claimable()
            began = time.monotonic()
            slot = await self._workers.slots.claim(
                self._model,
                service,
                call.request_id,
                self._queue_priority,
                patience_seconds=self._workers.patience_seconds,
                alone=alone,
                first=left is not None,
                equal_to=left.numerics_fingerprint if left is not None and resumes else "",
                wiring=self._wiring,
                on_no_workers=partial(self._warn_of_no_workers, call),
            )
            observe(QUEUE_WAIT_SECONDS.labels(*self._place), time.monotonic() - began)
            waiting.set(worker=slot.worker.worker_id)
            return slot

    def _warn_of_no_workers(self, call: Call, fault: str) -> None:
        """Report once that the request waits for a worker to start, and once that it waits for one that fits."""
        if bool(fault) not in self._warned:
            self._warned.add(bool(fault))
            what = f"can take the request ({fault})" if fault else "runs"
            call.warn("", f"no worker of {self._spec.service} {what}; the request waits for one")

    def _handed_over(self, attempt: _Attempt, error: HandedOver) -> None:
        """The worker leaves. The call is not lost: the request goes on at once, and nothing is counted against it."""
        worker = attempt.worker_slot.worker
        _log.info("attempt handed over", **_names(attempt), reason=error)
        HANDED_OVER_CALLS.labels(*self._place).inc()
        RETRIES.labels(*self._place, "handed_over").inc()
        attempt.hand_over()
        self._workers.connections.drop(worker.address)
        self._unreached_since = None

    async def _lost(self, attempt: _Attempt, error: FleetError) -> None:
        """Avoid the worker for a while. A call that had begun counts, if the worker is not announced again.

        Raises Unavailable when no worker was reached for too long.
        """
        worker, service = attempt.worker_slot.worker, self._spec.service
        _log.warning("attempt lost", **_names(attempt), begun=attempt.begun, error=error)
        LOST_CALLS.labels(*self._place, "yes" if attempt.begun else "no").inc()
        self._workers.connections.drop(worker.address)
        await self._avoid(worker.worker_id)
        if attempt.begun:
            self._unreached_since = None
            await self._recovery.worker_lost(worker.worker_id, service, self._stage)
            RETRIES.labels(*self._place, "lost").inc()
            return
        self._unreached_since = self._unreached_since or attempt.since
        patience = self._workers.patience_seconds
        if patience is not None and time.monotonic() - self._unreached_since >= patience:
            raise Unavailable(
                f"no worker of {service} was reached for {patience:g} s, at last: {error.message}"
            ) from error
        RETRIES.labels(*self._place, "lost").inc()

    async def _avoid(self, worker_id: str) -> None:
        try:
            seconds = await self._workers.slots.avoid(worker_id)
        except Unavailable as error:
            _log.warning("worker cannot be avoided", worker=worker_id, error=error)
        else:
            SUSPECTED_WORKERS.labels(*self._place).inc()
            _log.info("worker avoided", worker=worker_id, seconds=seconds)
