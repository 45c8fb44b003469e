"""Calls of a worker group with a follower thread: ranks run the same calls and stop at the same step."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import NoReturn

import pytest
import torch

from async_tests import HANG_SECONDS
from common.errors import Cancelled, DeadlineExceeded, FleetError, HandedOver, InvalidInput
from common.log_context import context_fields, log_scope
from common.stage import STEP_CHECKPOINTS, Call
from common.trace_context import Span, TraceContext, entered
from common.variants import HostedVariants
from services.denoising import group
from services.denoising.agreement import FollowingCall, LeadingCall, outcome, stop_of
from services.denoising.follower import Follower
from services.denoising.group import LeadingStages
from services.denoising.messages import Kind, Link, OutOfStep
from stage_server import SERVICE, Script, ScriptedStage, StageInput, artifacts, do_nothing

TOTAL_BYTES = 1 << 28


class Abandoned(BaseException):
    """Raised instead of exiting the process."""


@dataclass
class Ranks:
    """Rank 0, its link to the follower, and the follower thread's end event and errors."""

    leading: LeadingStages
    link: Link
    ended: threading.Event = field(default_factory=threading.Event)
    errors: list[OutOfStep] = field(default_factory=list)

    def run(self, call: Call | None = None, count: int = 100_000) -> torch.Tensor:
        """Run one call and return its latents."""
        outputs = self.leading.run(artifacts(count), call or Call("r1"))
        latents: torch.Tensor = outputs["denoised_latents"].parts["image"].latents
        return latents


def hosted(script: Script) -> HostedVariants:
    """Stages of two variants that run the same script."""
    return HostedVariants(SERVICE, {"text": [ScriptedStage(script)], "image": [ScriptedStage(script)]})


@contextmanager
def two_ranks(leads: Script, follows: Script | None = None) -> Iterator[Ranks]:
    """A group of two ranks that run these scripts; `follows` defaults to `leads`."""
    left, right = socket.socketpair()

    def abandon(reason: str) -> NoReturn:
        left.close()
        raise Abandoned(reason)

    leading = LeadingStages(SERVICE, hosted(leads), [Link(1, left)], abandon)
    following = Follower(SERVICE, hosted(follows or leads), Link(0, right), total_bytes=TOTAL_BYTES)
    ranks = Ranks(leading, Link(1, left))

    def follow() -> None:
        try:
            following.follow()
        except OutOfStep as error:
            ranks.errors.append(error)
        right.close()
        ranks.ended.set()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield ranks
        with suppress(OutOfStep):  # the follower may have ended
            ranks.link.send(Kind.END)
    finally:
        left.close()
        thread.join(HANG_SECONDS)
    assert not thread.is_alive()


def test_a_follower_gets_the_same_inputs_and_request_id() -> None:
    seen: list[tuple[str, StageInput]] = []
    with two_ranks(lambda x, call: seen.append((call.request_id, x))) as ranks:
        for _ in range(2):
            result = ranks.run(Call("r7"))
    assert len(seen) == 4
    assert {name for name, _ in seen} == {"r7"}
    (_, one), (_, other) = seen[:2]
    assert torch.equal(one.initial_latents.parts["image"].latents, other.initial_latents.parts["image"].latents)
    assert one.sampling == other.sampling
    assert one.text_conditioning is other.text_conditioning is None
    assert torch.equal(result, one.initial_latents.parts["image"].latents * 3)


def test_log_records_of_all_ranks_have_the_fields_of_the_call() -> None:
    seen: list[dict[str, str | int]] = []
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    named = log_scope(request_id="r1", model="emoji", stage=SERVICE, attempt=2)
    with two_ranks(lambda *_: seen.append(context_fields())) as ranks:
        with named, entered(Span(TraceContext(trace_id, "00f067aa0ba902b7"))):
            ranks.run(Call("r1"))
        ranks.run(Call("r2"))
    expected = {"request_id": "r1", "trace_id": trace_id, "model": "emoji", "stage": SERVICE, "attempt": 2}
    assert seen[:2] == [expected, expected]
    assert sorted(seen[2:], key=len) == [{}, {"request_id": "r2", "stage": SERVICE}], (
        "fields of the previous call must be removed"
    )


def test_all_ranks_run_the_variant_of_the_call() -> None:
    seen: list[tuple[str, str]] = []
    with two_ranks(lambda _, call: seen.append((call.request_id, call.variant))) as ranks:
        ranks.run(Call("r1", variant="image"))
        ranks.run(Call("r2"))
        assert ranks.leading.contract_of("image") == ranks.leading.contract
    assert seen == [("r1", "image"), ("r1", "image"), ("r2", ""), ("r2", "")]


def test_an_unknown_variant_leaves_the_ranks_in_step() -> None:
    with two_ranks(do_nothing) as ranks:
        with pytest.raises(InvalidInput, match="'video' is not a variant that denoising serves"):
            ranks.run(Call("r1", variant="video"))
        ranks.run(Call("r2", variant="text"))
        assert not ranks.ended.is_set()
    assert not ranks.errors


def test_only_rank_0_sends_progress_and_warnings() -> None:
    def report(_: StageInput, call: Call) -> None:
        call.warn("prompt", "too long")
        call.progress(1, 3)

    reports: list[object] = []
    call = Call(
        "r1", on_progress=lambda *step: reports.append(step), on_warning=lambda *warning: reports.append(warning)
    )
    with two_ranks(report) as ranks:
        ranks.run(call)
    assert reports == [("prompt", "too long"), (1, 3)]


def test_all_ranks_stop_at_the_same_step_after_cancellation() -> None:
    """Only rank 0's call is cancelled; rank 0's answer stops the follower at the same check."""
    call, steps = Call("r1"), {0: 0, 1: 0}

    def loop(rank: int, call_of_rank: Call) -> None:
        for step in range(1, 100):
            call_of_rank.check_cancelled()
            steps[rank] = step
            if rank == 0 and step == 5:
                call.cancelled.set()
            call_of_rank.progress(step, 100)

    with two_ranks(lambda _, each: loop(0, each), lambda _, each: loop(1, each)) as ranks:
        with pytest.raises(Cancelled, match="request r1 was cancelled"):
            ranks.run(call)
        assert steps == {0: 5, 1: 5}
        call.cancelled.clear()
        with pytest.raises(DeadlineExceeded, match="past its deadline"):
            ranks.run(Call("r2", deadline=time.monotonic()))
        assert not ranks.ended.is_set()


def test_all_ranks_stop_at_the_same_item_after_cancellation() -> None:
    """Rank 0 waits for a slow reader until cancellation; step checkpoints do not synchronize the ranks."""
    call, items = Call("r1"), {0: 0, 1: 0}
    received: list[tuple[str, int]] = []

    def receive_item(slot: str, index: int, _: object) -> None:
        if (slot, index) == ("denoised_blocks", 3):
            call.cancelled.set()
            call.check_cancelled()
        received.append((slot, index))

    def loop(rank: int, call_of_rank: Call) -> None:
        for number in range(10):
            call_of_rank.check_cancelled()
            if rank == 0:
                call_of_rank.checkpoint("state")
            call_of_rank.emit("denoised_blocks", "block", number)
            items[rank] = number + 1

    with two_ranks(lambda _, each: loop(0, each), lambda _, each: loop(1, each)) as ranks:
        with pytest.raises(Cancelled, match="request r1 was cancelled"):
            ranks.run(replace(call, on_item=receive_item))
        assert items == {0: 3, 1: 3}
        pairs = [(slot, number) for number in range(4) for slot in (STEP_CHECKPOINTS, "denoised_blocks")]
        assert received == pairs[:-1], "only rank 0 emits; the last block is not received"
        call.cancelled.clear()
        ranks.run(Call("r2"))
        assert items == {0: 10, 1: 10}
        assert not ranks.ended.is_set()


def test_all_ranks_hand_over_at_the_same_step() -> None:
    """Only rank 0's call is asked to hand over. After the hand-over, the group runs the next call."""
    call, steps = Call("r1"), {0: 0, 1: 0}

    def loop(rank: int, call_of_rank: Call) -> None:
        for step in range(1, 100):
            call_of_rank.check_cancelled()
            if call_of_rank.must_hand_over():
                raise HandedOver(f"after {step - 1} steps")
            steps[rank] = step
            if rank == 0 and step == 5:
                call.hand_over.set()

    with two_ranks(lambda _, each: loop(0, each), lambda _, each: loop(1, each)) as ranks:
        with pytest.raises(HandedOver, match="after 5 steps"):
            ranks.run(call)
        assert steps == {0: 5, 1: 5}
        ranks.run(Call("r2"))
        assert steps == {0: 99, 1: 99}
        assert not ranks.ended.is_set()


def refuse(*_: object) -> NoReturn:
    raise InvalidInput("no such step", field="resume_from.step")


def refuse_with_another_field(*_: object) -> NoReturn:
    raise InvalidInput("no such latents", field="resume_from.latents")


def crash(*_: object) -> NoReturn:
    raise RuntimeError("out of memory")


def test_an_error_that_all_ranks_raise_is_returned_to_the_caller() -> None:
    calls: list[str] = []

    def refuse_bad_request(_: StageInput, call: Call) -> None:
        calls.append(call.request_id)
        if call.request_id == "bad":
            refuse()

    with two_ranks(refuse_bad_request) as ranks:
        with pytest.raises(InvalidInput, match="no such step") as caught:
            ranks.run(Call("bad"))
        assert caught.value.field == "resume_from.step"
        ranks.run(Call("good"))
    assert sorted(calls) == ["bad", "bad", "good", "good"]


def test_errors_that_differ_between_ranks_end_the_group() -> None:
    for leads, follows in ((do_nothing, refuse), (refuse, do_nothing), (refuse, refuse_with_another_field)):
        with two_ranks(leads, follows) as ranks, pytest.raises(Abandoned):
            ranks.run()
        assert len(ranks.errors) == 1


@pytest.mark.parametrize(("leads", "follows"), [(crash, do_nothing), (do_nothing, crash)])
def test_an_unexpected_error_of_a_rank_ends_the_group(leads: Script, follows: Script) -> None:
    with two_ranks(leads, follows) as ranks, pytest.raises(Abandoned):
        ranks.run()
    assert len(ranks.errors) == 1


def _sleep_until(opened: threading.Event) -> None:
    opened.wait(HANG_SECONDS)


def test_the_wait_for_an_outcome_has_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "SETTLE_SECONDS", 0.05)
    opened = threading.Event()
    with two_ranks(do_nothing, lambda *_: _sleep_until(opened)) as ranks:
        with pytest.raises(Abandoned, match=r"rank 1 sent no message for 0\.05 s"):
            ranks.run()
        opened.set()


def test_unequal_numbers_of_cancellation_checks_end_the_group() -> None:
    with two_ranks(check_twice, do_nothing) as ranks:
        with suppress(Abandoned):  # rank 0 may return its result first
            ranks.run()
        assert ranks.ended.wait(HANG_SECONDS)
    assert "sent message 4; expected OUTCOME" in str(ranks.errors[0])
    with two_ranks(do_nothing, check_twice) as ranks, pytest.raises(Abandoned):
        ranks.run()
    assert "sent message 5; expected CHECK" in str(ranks.errors[0])


def test_invalid_utf8_in_messages_raises_out_of_step() -> None:
    with two_ranks(do_nothing) as ranks:
        ranks.link.send(Kind.CALL, b"\xff")
        ranks.link.send(Kind.END)
        assert ranks.ended.wait(HANG_SECONDS)
    assert "sent message 6; expected INPUT" in str(ranks.errors[0])
    here, there = socket.socketpair()
    with here, there:
        Link(0, there).send(Kind.OUTCOME, b"Cancelled\n\xff")
        with pytest.raises(OutOfStep, match=r"ended with Cancelled: \\xff on rank 1, but with a result on this rank"):
            group.compare(Link(1, here), b"")


def check_twice(_: StageInput, call: Call) -> None:
    call.check_cancelled()
    call.check_cancelled()


def test_errors_round_trip_between_ranks() -> None:
    for error in (Cancelled("request ä was cancelled"), DeadlineExceeded("late\nvery")):
        restored = stop_of(outcome(error))
        assert (type(restored), restored.message) == (type(error), error.message)
    with pytest.raises(ValueError, match="does not stop a call"):
        stop_of(outcome(FleetError("x")))


def test_leading_and_following_calls_stop_at_the_same_cancellation_check() -> None:
    answers: list[bytes] = []
    leading = LeadingCall("r1", send=answers.append)
    leading.check_cancelled()
    leading.cancelled.set()
    with pytest.raises(Cancelled):
        leading.check_cancelled()
    following = FollowingCall("r1", ask=lambda: answers.pop(0))
    following.check_cancelled()
    with pytest.raises(Cancelled, match="request r1 was cancelled"):
        following.check_cancelled()


def test_a_message_that_is_too_large_is_refused() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(bytes((Kind.CALL, 255, 255, 255, 255)))
        with pytest.raises(OutOfStep, match="4294967295 bytes"):
            Link(0, right).receive(Kind.CALL)
