"""The coordinator's registry of requests: cancel, take-over and drain in each phase of a request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import REGISTRY

from common.errors import InvalidInput, ResourceExhausted, Unavailable
from common.state import retries
from common.state.leases import Inherited
from common.state.records import State
from driver_case import CANCELLED, FAILED, Case, Gate, Store, restore, run_case, submission
from fleet.v1 import generation_pb2 as pb
from services.coordinator.request_life import Phase, Submission


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_RETRY_SECONDS", 0.001)


def test_cancel_during_admission_ends_a_request_without_a_claim() -> None:
    async def test(case: Case) -> None:
        gate = case.store.admit_gate = Gate()
        accepting = asyncio.create_task(case.driver.accept(submission()))
        await gate.reached.wait()
        assert case.phases == [Phase.ADMITTING]
        assert not case.driver.runs("r")
        case.driver.cancel("r")
        gate.opened.set()
        admission, execution = await accepting
        assert execution is not None
        assert not admission.replayed
        await case.wait_until()
        assert execution.phase is Phase.CLOSED
        assert [event async for event in execution.log.follow()] == []

    case = run_case(test)
    assert case.store.ends == [(1, CANCELLED, "")]
    assert not case.queue.claims


def test_cancel_while_admission_settles_ends_a_request_without_a_claim() -> None:
    async def test(case: Case) -> None:
        gate = case.store.get_gate = Gate()
        case.store.admit_error = Unavailable("the answer is lost")
        with pytest.raises(Unavailable, match="the answer is lost"):
            await case.driver.accept(submission())
        await gate.reached.wait()
        assert case.phases == [Phase.SETTLING]
        assert not case.driver.runs("r")
        case.driver.cancel("r")
        gate.opened.set()
        await case.wait_until()

    case = run_case(test)
    assert case.store.ends == [(1, CANCELLED, "")]
    assert not case.queue.claims


def test_cancel_during_take_over_ends_a_request_under_the_new_epoch() -> None:
    async def test(case: Case) -> None:
        await case.run()
        gate = case.store.finish_gate = Gate()
        await case.inherit()
        await gate.reached.wait()
        assert case.phases == [Phase.RUNNING, Phase.INHERITED]
        case.driver.cancel("r")
        gate.opened.set()
        await case.wait_until()

    case = run_case(test)
    assert case.store.ends == [(2, CANCELLED, "")]
    assert case.queue.claims == ["r"]


def test_repeated_cancels_end_a_running_request_once() -> None:
    async def test(case: Case) -> None:
        await case.run()
        assert case.driver.runs("r")
        case.driver.cancel("r")
        case.driver.cancel("r")
        await case.wait_until()
        assert not case.driver.runs("r")
        case.driver.cancel("r")  # after the end
        case.driver.cancel("other")  # an unknown request

    case = run_case(test)
    assert case.store.ends == [(1, CANCELLED, "")]


def test_cancels_reported_by_a_take_over_reach_their_requests() -> None:
    async def test(case: Case) -> None:
        await case.run()
        case.owners.cancelled = ["r"]
        await case.driver.take_over("emoji", restore)
        await case.wait_until()
        await case.inherit(cancel=True)
        await case.wait_until()

    case = run_case(test)
    assert case.store.ends == [(1, CANCELLED, ""), (2, CANCELLED, "")]


@pytest.mark.parametrize(("key", "phases"), [("k", [Phase.RUNNING]), ("", [])])
def test_only_a_request_with_an_idempotency_key_runs_after_a_lost_admission_reply(
    key: str, phases: list[Phase]
) -> None:
    async def test(case: Case) -> None:
        case.store.admit_error = Unavailable("the answer is lost")
        with pytest.raises(Unavailable):
            await case.driver.accept(submission(key=key))
        await case.wait_until(*phases)
        assert case.store.ends == ([] if key else [(1, CANCELLED, "")])
        await case.driver.drain(0)

    run_case(test)


def test_the_wait_for_the_store_counts_against_the_deadline() -> None:
    """The admission reply is lost, and the store answers the next read after the deadline."""

    async def test(case: Case) -> None:
        gate = case.store.get_gate = Gate()
        case.store.admit_error, case.store.deadline_seconds = Unavailable("the answer is lost"), 3_000
        with pytest.raises(Unavailable):
            await case.driver.accept(submission())
        await gate.reached.wait()
        (execution,) = case.driver._open
        execution._began -= 3_600  # as if the store had answered after an hour
        gate.opened.set()
        await case.wait_until()

    assert run_case(test).store.ends == [(1, State.REQUEST_STATE_EXPIRED, "")]


def test_a_request_that_was_not_stored_is_forgotten() -> None:
    async def test(case: Case) -> None:
        case.store.admit_error, case.store.is_stored = Unavailable("the store is unavailable"), False
        with pytest.raises(Unavailable):
            await case.driver.accept(submission())
        await case.wait_until()

    assert not run_case(test).store.ends


def test_refused_and_replayed_requests_are_not_executed() -> None:
    async def test(case: Case) -> None:
        case.store.admit_error = ResourceExhausted("the bound")
        with pytest.raises(ResourceExhausted, match="the bound"):
            await case.driver.accept(submission())
        case.store.admit_error, case.store.replayed = None, True
        admission, execution = await case.driver.accept(submission())
        assert admission.replayed
        assert execution is None
        await case.wait_until()

    case = run_case(test)
    assert not case.store.ends
    assert not case.queue.claims


def test_a_caller_that_disconnects_during_admission_does_not_stop_the_request() -> None:
    async def test(case: Case) -> None:
        gate = case.store.admit_gate = Gate()
        accepting = asyncio.create_task(case.driver.accept(submission()))
        await gate.reached.wait()
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        gate.opened.set()
        await case.wait_until(Phase.RUNNING)
        await case.driver.drain(0)

    run_case(test)


def test_a_request_in_any_phase_is_not_taken_over_again() -> None:
    """An inherited request counts as running immediately, so that the take-over loop ends."""

    async def test(case: Case) -> None:
        gate = case.store.admit_gate = Gate()
        accepting = asyncio.create_task(case.driver.accept(submission()))
        await gate.reached.wait()
        await case.inherit()
        assert case.phases == [Phase.ADMITTING, Phase.INHERITED]
        gate.opened.set()
        await accepting
        await case.wait_until(Phase.RUNNING)
        await case.claimed(1)
        await case.driver.take_over("emoji", restore)
        case.driver.cancel("r")
        await case.wait_until()

    case = run_case(test)
    assert case.owners.running == [["r"], ["r"], ["r"]]
    assert case.store.ends == [(2, CANCELLED, "")]
    assert case.queue.most_at_once == 1


def test_executions_of_different_epochs_do_not_overlap() -> None:
    async def test(case: Case) -> None:
        await case.run()
        for epoch in (2, 3, 4):
            await case.inherit(epoch)
        await case.wait_until(Phase.RUNNING)
        await case.claimed(2)
        case.driver.cancel("r")
        await case.wait_until()

    case = run_case(test)
    assert case.store.ends == [(4, CANCELLED, "")]
    assert case.queue.most_at_once == 1


def failed_requests() -> float:
    return REGISTRY.get_sample_value("fleet_requests_total", {"model": "emoji", "state": "FAILED"}) or 0.0


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (b"unfit", "the model is not served"),
        (b"\xff", "the stored submission is unreadable"),
        (b"raw", "the coordinator that streamed the result is lost"),
    ],
)
def test_an_inherited_request_that_cannot_run_fails(stored: bytes, reason: str) -> None:
    def refuse(record: pb.RequestRecord, stored: bytes) -> Submission:
        del record
        if stored == b"unfit":
            raise InvalidInput("the model is not served")
        if stored == b"raw":
            return submission(raw=True)
        pb.SubmitRequest.FromString(stored)
        raise AssertionError("the submission is readable")

    async def test(case: Case) -> None:
        case.store.epoch = 2
        record = pb.RequestRecord(request_id="r", model="emoji")
        case.owners.given.append([Inherited(record, 2, stored, False, None, "lost")])
        await case.driver.take_over("emoji", refuse)
        await case.wait_until()

    before = failed_requests()
    case = run_case(test)
    ((epoch, state, message),) = case.store.ends
    assert (epoch, state) == (2, FAILED)
    assert failed_requests() - before == 1
    assert reason in message
    assert case.owners.running == [[], ["r"]]


def test_a_drain_leaves_a_stored_request_for_another_coordinator() -> None:
    async def test(case: Case) -> None:
        await case.run()
        await case.driver.drain(0)
        assert case.phases == []

    assert not run_case(test).store.ends


def test_a_drain_ends_raw_and_cancelled_requests() -> None:
    async def test(case: Case) -> None:
        await case.run(raw=True)
        await case.driver.drain(0)

    ((_, state, message),) = run_case(test).store.ends
    assert state == FAILED
    assert message == "the coordinator of the request was shut down; submit it again"

    async def cancelled(case: Case) -> None:
        await case.run()
        case.driver.cancel("r")
        await case.driver.drain(0)

    assert run_case(cancelled).store.ends == [(1, CANCELLED, "")]


def test_a_drain_does_not_wait_for_the_store() -> None:
    async def test(case: Case) -> None:
        case.store.admit_gate = Gate()
        accepting = asyncio.create_task(case.driver.accept(submission()))
        await case.store.admit_gate.reached.wait()
        await case.driver.drain(10)
        assert case.phases == []
        with pytest.raises(asyncio.CancelledError):
            await accepting
        case.store.admit_gate = None
        case.store.get_gate = Gate()
        case.store.admit_error = Unavailable("the answer is lost")
        with pytest.raises(Unavailable):
            await case.driver.accept(submission())
        await case.store.get_gate.reached.wait()
        await case.driver.drain(10)
        assert case.phases == []

    assert not run_case(test).store.ends


def test_a_request_admitted_during_a_drain_is_left_for_another_coordinator() -> None:
    async def test(case: Case) -> None:
        await case.driver.drain(0)
        _, execution = await case.driver.accept(submission())
        await case.wait_until()
        assert execution is not None
        assert execution.files is None

    case = run_case(test)
    assert not case.store.ends
    assert not case.queue.claims


def test_storing_an_end_is_retried_with_the_same_token(monkeypatch: pytest.MonkeyPatch) -> None:
    finish, attempts = Store.finish, []

    async def unavailable_once(store: Store, *arguments: Any, **named: Any) -> list[pb.Event] | None:
        attempts.append(named["token"])
        if len(attempts) == 1:
            raise Unavailable("the store is unavailable")
        return await finish(store, *arguments, **named)

    async def test(case: Case) -> None:
        monkeypatch.setattr(Store, "finish", unavailable_once)
        await case.run()
        case.driver.cancel("r")
        await case.wait_until()

    assert run_case(test).store.ends == [(1, CANCELLED, "")]
    assert len(attempts) == 2
    assert attempts[0] == attempts[1]
