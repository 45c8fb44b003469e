"""Runs a service of a model on a worker with a free slot, and retries on another worker after a loss.

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
_CLOSING_SECONDS = 3_600.0
"""Grace time of a dropped channel, so that a worker that is shutting down can finish its calls."""


_log = get_logger(__name__)


class Connections:
    """Cached channels to workers.

    A channel is replaced after a lost call or hand-over. All channels are replaced when the TLS files change.
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
        """The runner for a service of a model's variant at an address. Drops the outputs in `unread`."""
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
        """Close a channel once its calls have ended; the next call to the address opens a new channel."""
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
    """Bounds the bytes of all packets that the running requests hold."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.used_bytes = 0

    def hold(self, packets: Iterable[Packet]) -> None:
        """Count packets until they are garbage-collected. Raises ResourceExhausted beyond the bound."""
        for packet in packets:
            size = packet.byte_size
            self.used_bytes += size
            weakref.finalize(packet, self._forget, size)
        if self.used_bytes > self._max_bytes:
            raise ResourceExhausted(
                f"artifacts of running requests use {self.used_bytes} bytes, more than max_artifact_bytes "
                f"({self._max_bytes})"
            )

    def _forget(self, size: int) -> None:
        self.used_bytes -= size


@dataclass(frozen=True)
class Workers:
    """Worker slots, channels and artifact memory for calls to workers."""

    slots: WorkerSlots
    connections: Connections
    memory: ArtifactMemory
    patience_seconds: float | None = None


@dataclass
class _Attempt:
    """A call to one worker. `on_begin` is called when its stages start, and `begun` is then True.

    Workers of earlier versions send no Begun frame. For these workers, `on_begin` is called at the start of the call,
    and a lost call counts as begun if the worker may have received it.
    """

    worker_slot: WorkerSlot
    on_begin: Callable[[], None]
    begun: bool = False
    steps_before: int = 0
    """The step of the step checkpoint from which the worker resumes."""
    steps_after: int = 0
    """The step of the newest step checkpoint that the worker has sent."""
    computed: Computed | None = None
    span: Span = NO_SPAN
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if not self.worker_slot.worker.reports_begun:
            self.on_begin()

    def begin(self) -> None:
        """Record that the worker has started the stages, or has replied from its cache."""
        if not self.begun:
            self.span.event("begun")
            if self.worker_slot.worker.reports_begun:
                self.on_begin()
        self.begun = True

    def add_computed(self, seconds: float) -> None:
        """Record the compute seconds that the worker reports at the end."""
        self.computed = Computed(seconds, self.steps_before)

    def hand_over(self) -> None:
        """Attribute the compute seconds of a handed-over call to the steps up to its last step checkpoint."""
        if self.computed is not None:
            self.computed = replace(self.computed, steps_after=self.steps_after)

    def lose(self, error: FleetError) -> None:
        """Record the loss of the call."""
        self.begun |= not self.worker_slot.worker.reports_begun and isinstance(error, WorkerLost)

    @property
    def seconds(self) -> float:
        """Seconds since the call was made."""
        return time.monotonic() - self.since


def _worker_of(attempt: _Attempt) -> dict[str, object]:
    """The worker of an attempt, as key-value pairs for a log line."""
    worker = attempt.worker_slot.worker
    return {"worker": worker.worker_id, "address": worker.address}


class _MetricLabels(NamedTuple):
    """The metric labels of a service of a model."""

    service: str
    model: str


@dataclass(frozen=True)
class _StepCheckpoints:
    """Sink for the step checkpoints of an attempt: stores the newest one for recovery."""

    attempt: _Attempt
    recovery: Recovery
    origin: str
    labels: _MetricLabels

    async def put(self, index: int, item: Packet, byte_size: int) -> None:
        """Receive a step checkpoint."""
        del index
        STEP_CHECKPOINTS_RECEIVED.labels(*self.labels).inc()
        STEP_CHECKPOINT_BYTES.labels(*self.labels).inc(byte_size)
        self.attempt.steps_after = step_of(item)
        self.attempt.span.event("checkpoint", step=self.attempt.steps_after, bytes=byte_size)
        self.recovery.step_checkpoint.remember(self.origin, item)


@dataclass(frozen=True)
class _WorkerItems:
    """Forwards each item of a worker's stream to `sink`, after the preceding step checkpoint is stored."""

    slot: str
    sink: ItemSink
    memory: ArtifactMemory
    recovery: Recovery
    span: Span

    async def put(self, index: int, item: Packet, byte_size: int) -> None:
        """Forward an item. Raises ResourceExhausted, with the slot as field, if artifacts exceed their memory bound."""
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

    A worker receives only the values in its announced contract, because its release may differ from this coordinator's.
    `stage` is the index of the service in the request. `on_begin` is called when a worker starts the stages. `tokens`
    is the work of one step, for the worker's metrics. After a loss, this coordinator avoids the worker for a while. A
    full worker is retried with backoff. Raises Unavailable when no worker was reachable for `patience_seconds`, and
    InternalError for a request that repeatedly loses its workers.
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
        self._labels = _MetricLabels(spec.service, model)
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
        """The combined inputs of the service's stages, and the outputs that other services or the result need."""
        return self._spec.contract

    async def __call__(self, values: Mapping[str, Any], call: Call) -> Mapping[str, Packet]:
        """Claim a worker slot, run the service, release the slot. A retry reads input streams from the start."""
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
                    if error.field:  # The error concerns a value of the request, not the worker.
                        raise
                    _log.info("worker is full", **_worker_of(attempt), error=error)
                    RETRIES.labels(*self._labels, "full").inc()
                    self._unreached_since = None
                else:
                    self._workers.memory.hold(outputs.values())  # ResourceExhausted here fails the request.
                    observe(SERVICE_SECONDS.labels(*self._labels), time.monotonic() - began)
                    return outputs
                finally:
                    self._workers.slots.release(attempt.worker_slot, used, attempt.computed)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    @contextmanager
    def _attempt_span(self, attempt: _Attempt) -> Iterator[None]:
        """Trace a call to a worker as a span. The status of a failed call is the class of the error."""
        worker, service = attempt.worker_slot.worker, self._spec.service
        _log.debug("attempt started", **_worker_of(attempt))
        with span(
            f"attempt {service}",
            SpanKind.CLIENT,
            service=service,
            attempt=self._attempts,
            worker=worker.worker_id,
            address=worker.address,
        ) as attempt.span:
            yield
        _log.debug("attempt finished", seconds=attempt.seconds, **_worker_of(attempt))

    async def _run(self, attempt: _Attempt, values: Mapping[str, Any], call: Call) -> Mapping[str, Packet]:
        """Run on one worker. Resumes from a step checkpoint if this does not change the result.

        A request that has emitted items of a stream also resumes with another numerics fingerprint.
        """
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
            RESUMED_CALLS.labels(*self._labels).inc()
            values = {**values, slot: checkpoint}
            attempt.steps_before = step_of(checkpoint)
            log_resumed(attempt.steps_before)
            attempt.span.set(resumed_at_step=attempt.steps_before)

        checkpoints = _StepCheckpoints(attempt, self._recovery, origin, self._labels)
        return await runner(values, replace(call, sinks={**sinks, STEP_CHECKPOINTS: checkpoints}))

    def _contract_of(self, worker: worker_pb2.WorkerInfo) -> Contract:
        """The contract that a worker announced, else the contract of this coordinator's release."""
        announced = contract_of(worker, self._wiring.variant) if worker.HasField("contract") else None
        return announced or self._spec.contract

    async def _claim(self, call: Call, left: worker_pb2.WorkerInfo | None) -> WorkerSlot:
        """Claim a worker slot; waits for a free slot and for the store.

        `left` is the worker that handed the call over, if any. Raises Unavailable after `patience_seconds` without a
        compatible live worker.
        """
        is_resumable, service = self._spec.resume_slot is not None, self._spec.service
        if is_resumable:
            # Before the claim, so that no worker slot is held while the store is unavailable.
            await self._recovery.step_checkpoint.load()
        resumes = is_resumable and self._recovery.step_checkpoint.is_known
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
            observe(QUEUE_WAIT_SECONDS.labels(*self._labels), time.monotonic() - began)
            waiting.set(worker=slot.worker.worker_id)
            return slot

    def _warn_of_no_workers(self, call: Call, fault: str) -> None:
        """Warn once that no worker is running, and once that no running worker is compatible."""
        if bool(fault) not in self._warned:
            self._warned.add(bool(fault))
            what = f"can serve the request ({fault})" if fault else "is running"
            call.warn("", f"no worker of {self._spec.service} {what}; the request waits")

    def _handed_over(self, attempt: _Attempt, error: HandedOver) -> None:
        """Record a hand-over by a worker that shuts down. The call does not count as lost, and is retried at once."""
        worker = attempt.worker_slot.worker
        _log.info("attempt handed over", **_worker_of(attempt), reason=error)
        HANDED_OVER_CALLS.labels(*self._labels).inc()
        RETRIES.labels(*self._labels, "handed_over").inc()
        attempt.hand_over()
        self._workers.connections.drop(worker.address)
        self._unreached_since = None

    async def _lost(self, attempt: _Attempt, error: FleetError) -> None:
        """Record a lost call, and avoid the worker for a while.

        A call that had begun counts against the request, unless the worker reappears. Raises Unavailable when no worker
        was reachable for `patience_seconds`.
        """
        worker, service = attempt.worker_slot.worker, self._spec.service
        _log.warning("attempt lost", **_worker_of(attempt), begun=attempt.begun, error=error)
        LOST_CALLS.labels(*self._labels, "yes" if attempt.begun else "no").inc()
        self._workers.connections.drop(worker.address)
        await self._avoid(worker.worker_id)
        if attempt.begun:
            self._unreached_since = None
            await self._recovery.worker_lost(worker.worker_id, service, self._stage)
            RETRIES.labels(*self._labels, "lost").inc()
            return
        self._unreached_since = self._unreached_since or attempt.since
        patience = self._workers.patience_seconds
        if patience is not None and time.monotonic() - self._unreached_since >= patience:
            raise Unavailable(
                f"no worker of {service} was reachable for {patience:g} s; last error: {error.message}"
            ) from error
        RETRIES.labels(*self._labels, "lost").inc()

    async def _avoid(self, worker_id: str) -> None:
        try:
            seconds = await self._workers.slots.avoid(worker_id)
        except Unavailable as error:
            _log.warning("worker not marked as suspect", worker=worker_id, error=error)
        else:
            SUSPECTED_WORKERS.labels(*self._labels).inc()
            _log.info("worker avoided", worker=worker_id, seconds=seconds)
