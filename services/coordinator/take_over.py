"""Acquires requests whose admission has no reply (settle), or that were taken over (inherit)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from google.protobuf.message import DecodeError

from common.errors import FleetError, InternalError, NotFound, Unavailable
from common.state.leases import Inherited
from common.state.requests import RequestStore
from common.state.retries import retry_until_available
from common.trace_context import entered
from fleet.v1 import generation_pb2
from services.coordinator.outcome import failure
from services.coordinator.request_life import Acquired, Execution, Phase, Submission
from services.coordinator.request_trace import RequestTrace

Restore: TypeAlias = Callable[[generation_pb2.RequestRecord, bytes], Submission]
"""Restores the submission of a stored request. Raises FleetError if it cannot run here."""


async def settle(execution: Execution, submission: Submission, store: RequestStore) -> Acquired | None:
    """Check whether a request was admitted although the reply was lost; None if it was not admitted.

    A request with an idempotency key runs, because its caller can retry with the key. Other requests are cancelled.
    """
    execution.phase = Phase.SETTLING
    request_id = execution.request_id
    try:
        stored = await retry_until_available("check of an unanswered admission", partial(store.get, request_id))
    except NotFound as error:
        submission.trace.refuse(error)
        return None
    execution.report_accepted(submission)
    if not submission.idempotency_key:
        execution.cancel()
    if not stored.HasField("deadline"):
        return Acquired(submission, None)
    allowed = (stored.deadline.ToNanoseconds() - stored.created_at.ToNanoseconds()) / 1e9
    return Acquired(submission, allowed - execution.seconds_old)


async def inherit(
    execution: Execution,
    inherited: Inherited,
    formers: Sequence[Execution],
    restore: Restore,
    store: RequestStore,
) -> Acquired | None:
    """Continue a request after a take-over; None if it cannot run here, in which case it ends as FAILED.

    Waits until its executions under earlier epochs (`formers`) have ended.
    """
    try:
        await _end(formers)
        submission = _restored(inherited, restore)
        if submission.raw:
            raise Unavailable("the coordinator that streamed the result is lost; submit the request again")
    except FleetError as error:
        failed = failure(error)
        request_id, epoch = execution.request_id, execution.epoch
        finish = partial(store.finish, request_id, failed.state, error=failed.error, epoch=epoch)
        if await retry_until_available("end of a request that cannot be taken over", finish) is not None:
            trace = RequestTrace.resume(inherited.record)
            trace.end(failed.state, failed.error)
            with entered(trace.root):
                execution.report_end(inherited.record.model, failed)
        return None
    submission.trace.taken_over(execution.epoch)
    return Acquired(submission, inherited.seconds_left)


def _restored(inherited: Inherited, restore: Restore) -> Submission:
    try:
        return restore(inherited.record, inherited.submission)
    except DecodeError as error:
        raise InternalError(f"the stored submission is unreadable: {error}") from error


async def _end(formers: Sequence[Execution]) -> None:
    """Cancel the executions under earlier epochs, whose results the store refuses, and wait for their end."""
    for former in formers:
        former.cancel()
    if formers:
        await asyncio.wait({former.task for former in formers})
