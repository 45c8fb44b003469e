"""The life cycle of a request in one coordinator: acquisition, stages, outcome, stored end."""

from __future__ import annotations

import asyncio
import enum
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeAlias

from common.errors import DeadlineExceeded, FleetError, InternalError, Unavailable
from common.log_context import log_scope
from common.logs import get_logger
from common.metrics import REQUEST_SECONDS, REQUESTS, STEPS_SAVED, observe
from common.pipeline import Runner, ServiceSpec, result_of, run_pipeline
from common.rpc.framing import Packet
from common.scaling import StageWork
from common.stage import Call, item_kind
from common.state.leases import Leases
from common.state.presence import TTL_SECONDS
from common.state.records import ResultFile, State
from common.state.requests import AdmissionLimits, RequestStore
from common.state.retries import retry_until_available
from common.state.worker_slots import QueuePriority
from common.trace_context import entered
from common.tracing import span
from common.wiring import Wiring, wirings_of
from fleet.v1 import generation_pb2
from services.coordinator.events import EventLog, EventWriter
from services.coordinator.outcome import Outcome, failure, success
from services.coordinator.progress_reporting import ProgressReportingRunner, RequestProgress
from services.coordinator.request_trace import RequestTrace
from services.coordinator.result_stream import FILES, ResultRunner, ResultStream
from services.coordinator.resume import Recovery
from services.coordinator.service_gauges import state_label
from services.coordinator.state_lines import described, log_state, prompts_of
from services.coordinator.worker_runner import WorkerRunner, Workers

_LATER_SECONDS = 1.0
"""Seconds added to the deadline for worker calls, so that the coordinator reports the expiry."""


_log = get_logger(__name__)


@dataclass(frozen=True)
class Submission:
    """A validated request. A `raw` result stays in memory for the caller of Generate, and is never stored.

    `costs` maps services to the costs of the request; see services.coordinator.costs.
    """

    record: generation_pb2.RequestRecord
    services: Sequence[ServiceSpec]
    values: Mapping[str, Packet]
    limits: AdmissionLimits
    idempotency_key: str = ""
    raw: bool = False
    stored: bytes = field(default=b"", repr=False)
    """The serialized request for a take-over by another coordinator."""
    costs: Mapping[str, int] = field(default_factory=dict)
    work: Mapping[str, StageWork] = field(default_factory=dict)
    """Work by service, for autoscaling."""
    trace: RequestTrace = field(default_factory=RequestTrace, repr=False)

    @cached_property
    def wirings(self) -> dict[str, Wiring]:
        """The inputs and outputs of each service in this request."""
        return wirings_of(self.record.variant, self.services, self.values)


@dataclass(frozen=True)
class ExecutionContext:
    """The store, leases and workers of a coordinator, with its settings for running requests."""

    store: RequestStore
    leases: Leases
    workers: Workers
    max_raw_result_bytes: int
    max_result_bytes: int
    worker_ttl_seconds: float = TTL_SECONDS
    step_seconds: float = 0.0
    log_prompts: bool = False


class Phase(enum.Enum):
    """The state of a request in this coordinator."""

    ADMITTING = enum.auto()
    """The store was asked to admit the request."""
    SETTLING = enum.auto()
    """The reply to the admission was lost. The store is asked whether it admitted the request."""
    INHERITED = enum.auto()
    """The request was taken over. Its execution under an earlier epoch, if any, ends first."""
    RUNNING = enum.auto()
    """Its stages are running, or its end is being stored."""
    CLOSED = enum.auto()
    """The request has ended, continues at another coordinator, or was not admitted."""


class Acquired(NamedTuple):
    """A request owned by this coordinator, with the seconds until its deadline; None without a deadline."""

    submission: Submission
    seconds_left: float | None


Acquire: TypeAlias = Callable[["Execution"], Awaitable[Acquired | None]]
"""Acquires a request: by admission, settling or take-over. Returns None if the request does not run here."""


class Execution:
    """A request in this coordinator under one epoch.

    `files` is the result, after the request has ended here. The constructor starts the task, which runs _live() and
    finally calls `on_closed`.
    """

    def __init__(
        self,
        context: ExecutionContext,
        record: generation_pb2.RequestRecord,
        phase: Phase,
        acquire: Acquire,
        on_closed: Callable[[Execution], None],
        *,
        epoch: int = 1,
    ) -> None:
        self.request_id = record.request_id
        self.epoch = epoch
        self.phase = phase
        self.log = EventLog()
        self.files: Sequence[ResultFile] | None = None
        self._began = time.monotonic()
        self._context = context
        self._cancel_requested = False
        self._stopped = False
        self._stages: asyncio.Task[dict[str, Any]] | None = None
        private = () if context.log_prompts else prompts_of(record.parameters).values()
        with log_scope(request_id=record.request_id, model=record.model, private=private):
            self.task = asyncio.create_task(self._live(acquire, on_closed))

    @property
    def seconds_old(self) -> float:
        """Seconds since this coordinator began to acquire the request."""
        return time.monotonic() - self._began

    def report_accepted(self, submission: Submission) -> None:
        """Log that the store has admitted the request."""
        record, prompts = submission.record, {}
        if self._context.log_prompts:
            prompts = prompts_of(record.parameters)
        variant, caller = record.variant or None, record.caller or None
        with entered(submission.trace.root):
            log_state(State.REQUEST_STATE_QUEUED, variant=variant, caller=caller, **prompts)

    def report_end(self, model: str, outcome: Outcome) -> None:
        """Log and count a request that ended here, with its duration."""
        name = state_label(outcome.state)
        REQUESTS.labels(model, name).inc()
        observe(REQUEST_SECONDS.labels(model, name), self.seconds_old)
        log_state(outcome.state, seconds=self.seconds_old, **described(outcome))

    def cancel(self) -> None:
        """End the request as CANCELLED, now or once it runs."""
        self._cancel_requested = True
        self._interrupt()

    def stop(self) -> None:
        """Stop because the coordinator shuts down; another coordinator continues the request where possible."""
        self._stopped = True
        self._interrupt()

    def _interrupt(self) -> None:
        if self._stages is not None:
            self._stages.cancel()

    async def _live(self, acquire: Acquire, on_closed: Callable[[Execution], None]) -> None:
        """Acquire the request, run its stages, find the outcome, store the end, close."""
        try:
            acquired = await acquire(self)
            if acquired is not None:
                self.phase = Phase.RUNNING
                with entered(acquired.submission.trace.root):
                    await self._run(acquired)
        finally:
            self.phase = Phase.CLOSED
            self.log.close()
            on_closed(self)

    async def _run(self, acquired: Acquired) -> None:
        """Run the stages and store the end, unless the request is left for another coordinator."""
        context, record = self._context, acquired.submission.record
        events = EventWriter(
            context.store, self.request_id, self.log, self.cancel, epoch=self.epoch, step_seconds=context.step_seconds
        )
        recovery = Recovery(context.leases, self.request_id, epoch=self.epoch, ttl_seconds=context.worker_ttl_seconds)
        progress = RequestProgress(record, events)
        result = ResultStream(
            context.store,
            events,
            self.request_id,
            max_bytes=context.max_raw_result_bytes if acquired.submission.raw else context.max_result_bytes,
            epoch=self.epoch,
            raw=acquired.submission.raw,
        )
        try:
            stages = self._start_stages(acquired, events, progress, recovery, result)
            done, _ = await asyncio.wait({stages}, timeout=acquired.seconds_left)
            if not done:
                stages.cancel()
                await asyncio.wait({stages})
            await result.close()
            await events.close()
            if self._is_left_behind(acquired.submission, stages, late=not done):
                _log.info("request left for another coordinator")
                return
            outcome = self._outcome(acquired, stages, progress, late=not done)
            await self._store_end(acquired.submission, outcome, events, result)
        finally:
            await result.close()
            await recovery.step_checkpoint.close()

    def _start_stages(
        self,
        acquired: Acquired,
        events: EventWriter,
        progress: RequestProgress,
        recovery: Recovery,
        result: ResultStream,
    ) -> asyncio.Task[dict[str, Any]]:
        submission, seconds_left = acquired
        workers, record = self._context.workers, submission.record
        deadline = None if seconds_left is None else time.monotonic() + seconds_left + _LATER_SECONDS
        call = Call(self.request_id, on_warning=events.warning, deadline=deadline, variant=record.variant)
        runners: list[Runner] = [
            ProgressReportingRunner(
                WorkerRunner(
                    workers,
                    record.model,
                    spec,
                    stage,
                    queue_priority_of(submission, spec.service),
                    recovery,
                    partial(progress.begin, spec),
                    wiring=submission.wirings[spec.service],
                    tokens=submission.work[spec.service].tokens if spec.service in submission.work else 0,
                ),
                spec,
                progress,
            )
            for stage, spec in enumerate(submission.services)
        ]

        slot = result_of(submission.services)
        is_streamed = item_kind(submission.services[-1].contract.outputs[slot]) is not None
        if is_streamed:
            runners.append(ResultRunner(slot, result))

        async def run_stages() -> dict[str, Any]:
            workers.memory.hold(submission.values.values())
            if is_streamed:
                recovery.has_emitted = await result.has_items()
            return await run_pipeline(runners, submission.values, call, wanted=(FILES if is_streamed else slot,))

        self._stages = asyncio.create_task(run_stages())
        if self._cancel_requested or self._stopped:
            self._stages.cancel()
        return self._stages

    def _is_left_behind(self, submission: Submission, stages: asyncio.Task[dict[str, Any]], *, late: bool) -> bool:
        """Whether only the shutdown stopped the request, in which case another coordinator can continue it."""
        ends_here = self._cancel_requested or late or submission.raw or not submission.stored
        return self._stopped and stages.cancelled() and not ends_here

    def _outcome(
        self, acquired: Acquired, stages: asyncio.Task[dict[str, Any]], progress: RequestProgress, *, late: bool
    ) -> Outcome:
        """The outcome of the request, from the result of its stages."""
        error = None if stages.cancelled() else stages.exception()
        if not stages.cancelled() and error is None:
            ((slot, value),) = stages.result().items()
            if slot == FILES:
                return Outcome(State.REQUEST_STATE_SUCCEEDED, files=value)
            max_bytes = self._context.max_raw_result_bytes if acquired.submission.raw else None
            return success(slot, value, max_bytes=max_bytes)
        if late or (isinstance(error, DeadlineExceeded) and acquired.seconds_left is not None):
            return Outcome(State.REQUEST_STATE_EXPIRED, steps_saved=progress.steps_left)
        if self._cancel_requested:
            return Outcome(State.REQUEST_STATE_CANCELLED, steps_saved=progress.steps_left)
        if error is None:
            return failure(Unavailable("the coordinator of the request was shut down; submit it again"))
        if isinstance(error, FleetError):
            return failure(error)
        _log.error("request failed with an unexpected error", exc_info=error)
        return failure(InternalError(f"{type(error).__name__}: {error}"))

    async def _store_end(
        self, submission: Submission, outcome: Outcome, events: EventWriter, result: ResultStream
    ) -> None:
        """Store the end of the request; retries until the store is available."""
        store, model = self._context.store, submission.record.model
        token = secrets.token_hex(8)  # Identifies retries, because an attempt with a lost reply may have succeeded.

        async def finish() -> list[generation_pb2.Event] | None:
            return await store.finish(
                self.request_id,
                outcome.state,
                error=outcome.error,
                files=outcome.files,
                stored=not submission.raw,
                items=result.items,
                events=await events.rest(),
                steps_saved=outcome.steps_saved,
                epoch=self.epoch,
                token=token,
            )

        try:
            with span("store end", bytes=sum(file.header.byte_size for file in outcome.files)):
                last = await retry_until_available("end of a request", finish)
            if last is not None:
                events.report_written_with_end()
        except InternalError as error:
            _log.exception("end of the request could not be stored")
            outcome = failure(error)
            last = await store.finish(self.request_id, outcome.state, error=outcome.error, epoch=self.epoch)
        self.files = None if last is None else outcome.files
        self.log.extend(last or ())
        if last is None:
            _log.info("request ended or continues at another coordinator")
            return
        submission.trace.end(outcome.state, outcome.error, steps_saved=outcome.steps_saved)
        self.report_end(model, outcome)
        STEPS_SAVED.labels(model).inc(outcome.steps_saved)


def queue_priority_of(submission: Submission, service: str) -> QueuePriority:
    """The priority of a request in the queue of a service."""
    record = submission.record
    due = record.deadline.ToMilliseconds() if record.HasField("deadline") else 0
    return QueuePriority(record.priority, due, record.caller, submission.costs.get(service, 1))
