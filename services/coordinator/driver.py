"""Takes accepted requests through the stages of their models, each to exactly one end."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from common.errors import DeadlineExceeded, FleetError, InternalError, NotFound, ResourceExhausted, Unavailable
from common.pipeline import ServiceSpec, run_pipeline
from common.rpc.framing import Packet
from common.rpc.status import MAX_FIELD, to_status
from common.stage import Call
from common.state.leases import Inherited, Leases
from common.state.presence import TTL_SECONDS
from common.state.records import ResultFile, State, StateValue
from common.state.requests import Admission, Limits, RequestStore
from common.state.slots import Rank
from common.telemetry import REQUESTS, STEPS_SAVED, request_scope
from fleet.v1 import artifacts_pb2, generation_pb2
from services.coordinator.dispatch import WorkerRunner, Workers
from services.coordinator.events import EventLog, EventWriter
from services.coordinator.persistence import LONGEST_RETRY_SECONDS, persist
from services.coordinator.reporting import Reporting, RequestProgress
from services.coordinator.resume import Recovery

_LATER_SECONDS = 1.0  # how much later the workers' deadline is, so that it is the coordinator who says it passed
_RESULT_SLOT = "media"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submission:
    """A validated request. `raw` results are kept in memory for the caller who waits, and never stored.

    `costs` say how much it asks of each service; see services.coordinator.costs.
    """

    record: generation_pb2.RequestRecord
    services: Sequence[ServiceSpec]
    values: Mapping[str, Packet]
    limits: Limits
    idempotency_key: str = ""
    raw: bool = False
    stored: bytes = field(default=b"", repr=False)
    """What another coordinator needs to run it."""
    costs: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Execution:
    """A request under way in this coordinator. `files` are its result, once it has ended here."""

    submission: Submission
    seconds_left: float | None
    log: EventLog
    task: asyncio.Task[None] | None = None
    work: asyncio.Task[dict[str, Any]] | None = None
    cancel_requested: bool = False
    files: Sequence[ResultFile] | None = field(default=None, repr=False)
    epoch: int = 1

    @property
    def request_id(self) -> str:
        """Its name."""
        return self.submission.record.request_id


@dataclass(frozen=True)
class _Outcome:
    state: StateValue
    error: generation_pb2.Error | None = None
    files: Sequence[ResultFile] = ()
    steps_saved: int = 0


Restore: TypeAlias = Callable[[generation_pb2.RequestRecord, bytes], Submission]


class Driver:
    """Admits requests and runs them. One for each coordinator."""

    def __init__(
        self,
        store: RequestStore,
        leases: Leases,
        workers: Workers,
        *,
        max_raw_result_bytes: int,
        worker_ttl_seconds: float = TTL_SECONDS,
        step_seconds: float = 0.0,
    ) -> None:
        self._store = store
        self._leases = leases
        self._worker_ttl_seconds = worker_ttl_seconds
        self._workers = workers
        self._max_raw_result_bytes = max_raw_result_bytes
        self._step_seconds = step_seconds
        self._executions: dict[str, Execution] = {}
        self._accepting: dict[str, bool] = {}  # whether each is to be cancelled as soon as it runs
        self._settling: set[str] = set()  # ids of requests that will be run once it is known that they should be
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False

    @property
    def running(self) -> int:
        """Requests that have not ended."""
        return len(self._executions)

    async def accept(self, submission: Submission) -> tuple[Admission, Execution | None]:
        """Store a request and start it; None for a replayed one. Goes on when the caller is cancelled meanwhile.

        Raises what RequestStore.admit raises.
        """
        return await asyncio.shield(self._spawn(self._accept(submission)))

    async def _accept(self, submission: Submission) -> tuple[Admission, Execution | None]:
        record = submission.record
        self._accepting[record.request_id] = False
        try:
            admission = await self._store.admit(
                record,
                idempotency_key=submission.idempotency_key,
                submission=submission.stored,
                limits=submission.limits,
                costs=submission.costs,
            )
            if admission.replayed:
                return admission, None
            return admission, self._start(Execution(submission, admission.seconds_left, EventLog(admission.events)))
        except Unavailable:
            self._settling.add(record.request_id)
            self._spawn(self._settle(submission))
            raise
        finally:
            del self._accepting[record.request_id]

    async def _settle(self, submission: Submission) -> None:
        """Find out whether a request was stored although the answer was lost, and if so run it or end it.

        One with an idempotency key is run: its caller will ask for it again.
        """
        request_id = submission.record.request_id
        try:
            stored = await persist(f"request {request_id} may be stored", partial(self._store.get, request_id))
        except NotFound:
            return
        finally:
            self._settling.discard(request_id)
        left = stored.deadline.ToNanoseconds() - stored.created_at.ToNanoseconds()
        execution = self._start(Execution(submission, left / 1e9 if stored.HasField("deadline") else None, EventLog()))
        if not submission.idempotency_key:
            self._cancel(execution)

    def _start(self, execution: Execution) -> Execution:
        execution.cancel_requested |= self._accepting.get(execution.request_id, False)
        self._executions[execution.request_id] = execution
        execution.task = self._spawn(self._drive(execution))
        return execution

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def runs(self, request_id: str) -> bool:
        """Whether a request is under way here."""
        return request_id in self._executions

    def cancel(self, request_id: str) -> None:
        """End a request as CANCELLED if it runs here, or is about to."""
        if request_id in self._accepting:
            self._accepting[request_id] = True
        elif execution := self._executions.get(request_id):
            self._cancel(execution)

    def _cancel(self, execution: Execution) -> None:
        execution.cancel_requested = True
        if execution.work is not None:
            execution.work.cancel()

    async def drain(self, grace: float) -> None:
        """Let running requests finish within `grace` seconds; others are for the next coordinator to go on with.

        A raw one, whose result nobody else could deliver, ends as FAILED.
        """
        tasks = [execution.task for execution in self._executions.values() if execution.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=grace)
        self._stopping = True
        for execution in list(self._executions.values()):
            if execution.work is not None:
                execution.work.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LONGEST_RETRY_SECONDS)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _drive(self, execution: Execution) -> None:
        record = execution.submission.record
        with request_scope(record.request_id):
            ended = partial(self._cancel, execution)
            events = EventWriter(
                self._store,
                record.request_id,
                execution.log,
                ended,
                epoch=execution.epoch,
                step_seconds=self._step_seconds,
            )
            recovery = Recovery(
                self._leases,
                record.request_id,
                epoch=execution.epoch,
                ttl_seconds=self._worker_ttl_seconds,
            )
            progress = RequestProgress(record, events)
            execution.work = asyncio.create_task(self._run(execution, events, progress, recovery))
            if execution.cancel_requested or self._stopping:
                execution.work.cancel()
            try:
                done, _ = await asyncio.wait({execution.work}, timeout=execution.seconds_left)
                if not done:
                    execution.work.cancel()
                    await asyncio.wait({execution.work})
                await events.close()
                if self._is_left_behind(execution, execution.work, late=not done):
                    _log.warning("request %s is left for another coordinator", record.request_id)
                    return
                outcome = self._outcome(execution, execution.work, progress, late=not done)
                await self._finish(execution, outcome, events)
            finally:
                await recovery.point.close()
                execution.log.close()
                del self._executions[record.request_id]

    def _is_left_behind(self, execution: Execution, work: asyncio.Task[dict[str, Any]], *, late: bool) -> bool:
        """Whether it was this coordinator's own end that stopped a request which another one can run."""
        kept = execution.cancel_requested or late or execution.submission.raw or not execution.submission.stored
        return self._stopping and work.cancelled() and not kept

    async def _run(
        self, execution: Execution, events: EventWriter, progress: RequestProgress, recovery: Recovery
    ) -> dict[str, Any]:
        submission = execution.submission
        record = submission.record
        deadline = None
        if execution.seconds_left is not None:
            deadline = time.monotonic() + execution.seconds_left + _LATER_SECONDS
        call = Call(record.request_id, on_warning=events.warning, deadline=deadline, variant=record.variant)
        runners = [
            Reporting(
                WorkerRunner(
                    self._workers,
                    record.model,
                    spec,
                    stage,
                    _rank(submission, spec.service),
                    recovery,
                    partial(progress.begin, spec),
                ),
                spec,
                progress,
            )
            for stage, spec in enumerate(submission.services)
        ]
        self._workers.memory.hold(submission.values.values())
        return await run_pipeline(runners, submission.values, call, wanted=(_RESULT_SLOT,))

    def _outcome(
        self, execution: Execution, work: asyncio.Task[dict[str, Any]], progress: RequestProgress, *, late: bool
    ) -> _Outcome:
        """How a request ended."""
        if not work.cancelled() and work.exception() is None:
            return self._success(execution, work.result()[_RESULT_SLOT])
        error = None if work.cancelled() else work.exception()
        if late or (isinstance(error, DeadlineExceeded) and execution.seconds_left is not None):
            return _Outcome(State.REQUEST_STATE_EXPIRED, steps_saved=progress.steps_left)
        if execution.cancel_requested:
            return _Outcome(State.REQUEST_STATE_CANCELLED, steps_saved=progress.steps_left)
        if error is None:
            return _failure(Unavailable("the coordinator that ran it was shut down; submit it again"))
        if isinstance(error, FleetError):
            return _failure(error)
        _log.error("request failed by a defect", exc_info=error)
        return _failure(InternalError(f"{type(error).__name__}: {error}"))

    def _success(self, execution: Execution, media: Packet) -> _Outcome:
        try:
            files = result_files(media)
        except InternalError as error:
            return _failure(error)
        size = sum(file.header.byte_size for file in files)
        if execution.submission.raw and size > self._max_raw_result_bytes:
            message = f"the raw result has {size} bytes; at most {self._max_raw_result_bytes} are streamed"
            return _failure(ResourceExhausted(message, field="output_format"))
        return _Outcome(State.REQUEST_STATE_SUCCEEDED, files=files)

    async def _finish(self, execution: Execution, outcome: _Outcome, events: EventWriter) -> None:
        """Write the end down, however long the store is away."""
        record = execution.submission.record
        token = secrets.token_hex(8)  # the same for each attempt: one whose answer is lost may have ended the request

        async def finish() -> list[generation_pb2.Event] | None:
            return await self._store.finish(
                record.request_id,
                outcome.state,
                error=outcome.error,
                files=outcome.files,
                stored=not execution.submission.raw,
                events=await events.rest(),
                steps_saved=outcome.steps_saved,
                epoch=execution.epoch,
                token=token,
            )

        try:
            last = await persist(f"request {record.request_id} has ended", finish)
        except InternalError as error:
            _log.exception("the end of the request could not be stored")
            failed = _failure(error)
            last = await self._store.finish(record.request_id, failed.state, error=failed.error, epoch=execution.epoch)
        execution.files = None if last is None else outcome.files
        execution.log.extend(last or ())
        name = State.Name(outcome.state).removeprefix("REQUEST_STATE_")
        if last is None:
            _log.info("request %s ends elsewhere", record.request_id)
            return
        REQUESTS.labels(record.model, name).inc()
        STEPS_SAVED.labels(record.model).inc(outcome.steps_saved)
        why = f": {outcome.error.message}" if outcome.error else ""
        _log.info("request %s of %s is %s%s", record.request_id, record.model, name, why)

    async def take_over(self, model: str, restore: Restore, *, beyond_own: bool = True) -> None:
        """Go on with open requests of a model that nobody runs, end those that are cancelled. Raises Unavailable.

        Unless `beyond_own`, only with those that belong to this coordinator: the store may have given it one whose
        news was lost. `restore` makes the submission of a stored one again. One that cannot be run here ends as FAILED.
        """
        inherited = True
        while inherited:
            running = (*self._executions, *self._accepting, *self._settling)
            taken, cancelled = await self._leases.take_over(model, running=running, beyond_own=beyond_own)
            for each in taken:
                _log.warning("request %s is taken over: nobody runs it", each.record.request_id)
                self._settling.add(each.record.request_id)
                self._spawn(self._inherit(each, restore))
            for request_id in cancelled:
                self.cancel(request_id)
            inherited = bool(taken)

    async def _inherit(self, inherited: Inherited, restore: Restore) -> None:
        record, epoch = inherited.record, inherited.epoch
        try:
            await self._end_former(record.request_id)
            submission = restore(record, inherited.submission)
            if submission.raw:
                raise Unavailable("the coordinator that streamed it is gone; submit it again")
            execution = Execution(submission, inherited.seconds_left, EventLog(), epoch=epoch)
            execution.cancel_requested = inherited.cancel_requested
            self._start(execution)
        except FleetError as error:
            failed = _failure(error)
            finish = partial(self._store.finish, record.request_id, failed.state, error=failed.error, epoch=epoch)
            await persist(f"request {record.request_id} cannot be taken over", finish)
        finally:
            self._settling.discard(record.request_id)

    async def _end_former(self, request_id: str) -> None:
        """Stop what this coordinator still does for a request under an earlier epoch, none of which counts any more."""
        former = self._executions.get(request_id)
        if former is not None and former.task is not None:
            self._cancel(former)
            await asyncio.wait({former.task})


def _rank(submission: Submission, service: str) -> Rank:
    """A request's place in the queue of a service."""
    record = submission.record
    due = record.deadline.ToMilliseconds() if record.HasField("deadline") else 0
    return Rank(record.priority, due, record.caller, submission.costs.get(service, 1))


def result_files(packet: Packet) -> list[ResultFile]:
    """The files in a packet of Media."""
    media = packet.message
    if not isinstance(media, artifacts_pb2.Media):
        raise InternalError(f"the result is a {media.DESCRIPTOR.name}, not Media")
    return [
        ResultFile(
            generation_pb2.FileHeader(
                index=index,
                count=len(media.items),
                content_type=item.content_type,
                byte_size=item.data.byte_size,
                height=item.height,
                width=item.width,
                num_frames=item.num_frames,
            ),
            list(packet.payload(f"{_RESULT_SLOT}.items.{index}.data", item.data)),
        )
        for index, item in enumerate(media.items)
    ]


def _failure(error: FleetError) -> _Outcome:
    status = to_status(error)  # with a message of bounded size
    return _Outcome(
        State.REQUEST_STATE_FAILED,
        generation_pb2.Error(code=status.code.name, message=status.details, field=error.field[:MAX_FIELD]),
    )
