"""Admission, take-over and draining of requests, and the registry of running executions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial

from common.errors import FleetError, Unavailable
from common.log_context import log_scope
from common.metrics import TAKEN_OVER_REQUESTS
from common.state.leases import Inherited
from common.state.requests import Admission
from common.state.retries import LONGEST_RETRY_SECONDS
from common.trace_context import entered
from fleet.v1 import generation_pb2
from services.coordinator.request_life import Acquire, Acquired, Execution, ExecutionContext, Phase, Submission
from services.coordinator.request_trace import stored_span
from services.coordinator.state_lines import log_taken_over
from services.coordinator.take_over import Restore, inherit, settle


class OpenExecutions:
    """The executions of this coordinator that are not closed.

    A request has several executions while its take-over waits until the executions under earlier epochs end.
    """

    def __init__(self) -> None:
        self._executions: dict[str, list[Execution]] = {}

    def __iter__(self) -> Iterator[Execution]:
        """Iterate over all executions."""
        return iter([execution for each in self._executions.values() for execution in each])

    def request_ids(self) -> list[str]:
        """The IDs of all requests."""
        return list(self._executions)

    def of(self, request_id: str) -> list[Execution]:
        """The executions of a request by epoch, the latest last."""
        return list(self._executions.get(request_id, ()))

    def add(self, execution: Execution) -> None:
        """Add an execution."""
        self._executions.setdefault(execution.request_id, []).append(execution)

    def discard(self, execution: Execution) -> None:
        """Remove a closed execution."""
        left = [each for each in self._executions[execution.request_id] if each is not execution]
        if left:
            self._executions[execution.request_id] = left
        else:
            del self._executions[execution.request_id]


class Driver:
    """Admits requests and runs them. Each coordinator has one."""

    def __init__(self, context: ExecutionContext) -> None:
        self._context = context
        self._open = OpenExecutions()
        self._stopping = False

    async def accept(self, submission: Submission) -> tuple[Admission, Execution | None]:
        """Store a request and start it, even if the calling task is cancelled. A replayed request has no execution.

        Raises the errors of RequestStore.admit().
        """
        record = submission.record
        submission.trace.describe(record)
        with log_scope(request_id=record.request_id, model=record.model), entered(submission.trace.root):
            admission = asyncio.create_task(self._admit(submission))
        execution = self._begin(submission.record, Phase.ADMITTING, partial(self._acquire, submission, admission))
        admitted = await asyncio.shield(admission)
        return admitted, None if admitted.replayed else execution

    async def _admit(self, submission: Submission) -> Admission:
        return await self._context.store.admit(
            submission.record,
            idempotency_key=submission.idempotency_key,
            submission=submission.stored,
            limits=submission.limits,
            costs=submission.costs,
            work=submission.work,
            wirings=submission.wirings,
        )

    async def _acquire(
        self, submission: Submission, admission: asyncio.Task[Admission], execution: Execution
    ) -> Acquired | None:
        """Wait for the store's reply to an admission; None for a refused or replayed request."""
        try:
            admitted = await admission
        except Unavailable:
            return await settle(execution, submission, self._context.store)
        except FleetError:
            return None  # accept() raises the error.
        if admitted.replayed:
            submission.trace.replay(admitted.record.request_id)
            return None
        execution.report_accepted(submission)
        execution.log.extend(admitted.events)
        return Acquired(submission, admitted.seconds_left)

    async def take_over(self, model: str, restore: Restore, *, beyond_own: bool = True) -> None:
        """Continue a model's open requests that have no live owner, and apply cancellations. Raises Unavailable.

        With `beyond_own` False, continues only requests that this coordinator already owns but does not run, because
        the reply to an earlier take-over was lost. A request that cannot run here ends as FAILED.
        """
        is_more = True
        while is_more and not self._stopping:  # While drain() stops requests, this loop must not retake them.
            running = self._open.request_ids()
            taken, cancelled = await self._context.leases.take_over(model, running=running, beyond_own=beyond_own)
            for inherited in taken:
                self._inherit(inherited, restore)
            for request_id in cancelled:
                self.cancel(request_id)
            is_more = bool(taken)

    def _inherit(self, inherited: Inherited, restore: Restore) -> None:
        record = inherited.record
        with log_scope(request_id=record.request_id, model=record.model), entered(stored_span(record)):
            log_taken_over(inherited.epoch)
        TAKEN_OVER_REQUESTS.labels(record.model, inherited.cause).inc()
        formers = self._open.of(record.request_id)
        acquire = partial(inherit, inherited=inherited, formers=formers, restore=restore, store=self._context.store)
        execution = self._begin(record, Phase.INHERITED, acquire, epoch=inherited.epoch)
        if inherited.cancel_requested:
            execution.cancel()

    def _begin(
        self, record: generation_pb2.RequestRecord, phase: Phase, acquire: Acquire, *, epoch: int = 1
    ) -> Execution:
        execution = Execution(self._context, record, phase, acquire, self._open.discard, epoch=epoch)
        self._open.add(execution)
        if self._stopping:
            execution.stop()
        return execution

    def runs(self, request_id: str) -> bool:
        """Whether a request is running here."""
        return any(execution.phase is Phase.RUNNING for execution in self._open.of(request_id))

    def cancel(self, request_id: str) -> None:
        """Cancel a request if it is running or starting here."""
        for execution in self._open.of(request_id):
            execution.cancel()

    async def drain(self, grace: float) -> None:
        """Wait at most `grace` seconds for running requests, then leave the rest to other coordinators.

        A request with a raw result ends as FAILED, because no other coordinator can deliver the result.
        """
        await self._wait_for_running(grace)
        self._stopping = True
        for execution in self._open:
            execution.stop()
        await self._wait_for_running(LONGEST_RETRY_SECONDS)
        rest = [execution.task for execution in self._open]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _wait_for_running(self, seconds: float) -> None:
        tasks = [execution.task for execution in self._open if execution.phase is Phase.RUNNING]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
