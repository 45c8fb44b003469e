"""Stops a call at the same point on all ranks: rank 0 decides, and sends each answer to the followers.

A stage asks its Call whether to continue, for example at each step and at each emitted item. All ranks run the same
code on equal inputs, so rank 0's answer to the n-th question is also the answer to the n-th question of each
follower. If each rank decided by its own clock, a rank could stop while the other ranks wait for it in a collective. An
answer costs rank 0 one small send per follower. A follower waits only while rank 0 has not reached the same question.
Answers do not synchronize with the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common.errors import Cancelled, DeadlineExceeded, FleetError
from common.stage import STEP_CHECKPOINTS, Call

CONTINUE = b""
"""The answer that continues the stage. Other answers are HAND_OVER, and outcome() of the error that ends the stage."""

HAND_OVER = b"hand over"
"""The answer to must_hand_over() that ends a stage at the current step boundary."""

_STOPS: dict[str, type[FleetError]] = {kind.__name__: kind for kind in (Cancelled, DeadlineExceeded)}


def outcome(error: FleetError) -> bytes:
    """Encode the class and message of an error, so that ranks can compare errors."""
    return f"{type(error).__name__}\n{error.message}".encode()


def stop_of(answer: bytes) -> FleetError:
    """Decode the error in an answer. Raises ValueError for an error that rank 0 never sends."""
    kind, _, message = answer.decode().partition("\n")
    if kind not in _STOPS:
        raise ValueError(f"{kind!r} does not stop a call")
    return _STOPS[kind](message)


@dataclass(frozen=True)
class LeadingCall(Call):
    """The call of rank 0. Decides by cancellation, deadline and hand-over, and sends each answer to the followers."""

    send: Callable[[bytes], None] = field(kw_only=True)

    def check_cancelled(self) -> None:
        """Raise Cancelled or DeadlineExceeded on all ranks if the call must stop."""
        try:
            super().check_cancelled()
        except (Cancelled, DeadlineExceeded) as error:
            self.send(outcome(error))
            raise
        self.send(CONTINUE)

    def emit(self, slot: str, artifact: Any, index: int | None = None) -> None:
        """Emit an item. If a slow reader blocks rank 0 until cancellation or deadline, all ranks raise the error.

        Sends no answer for step checkpoints, because their emission never blocks, and because a follower emits fewer
        step checkpoints than rank 0.
        """
        if slot == STEP_CHECKPOINTS:
            super().emit(slot, artifact, index)
            return
        try:
            super().emit(slot, artifact, index)
        except (Cancelled, DeadlineExceeded) as error:
            self.send(outcome(error))
            raise
        self.send(CONTINUE)

    def must_hand_over(self) -> bool:
        """Decide for all ranks whether to hand over at this step boundary."""
        decided = super().must_hand_over()
        self.send(HAND_OVER if decided else CONTINUE)
        return decided


@dataclass(frozen=True)
class FollowingCall(Call):
    """The call of a follower: stops when rank 0 stops, and discards progress and items."""

    ask: Callable[[], bytes] = field(kw_only=True)

    def check_cancelled(self) -> None:
        """Wait for rank 0's answer. Raises the error in the answer, if any."""
        if answer := self.ask():
            raise stop_of(answer)

    def emit(self, slot: str, artifact: Any, index: int | None = None) -> None:
        """Wait until rank 0 has emitted the item. Raises rank 0's error. Ignores step checkpoints."""
        del artifact, index
        if slot != STEP_CHECKPOINTS:
            self.check_cancelled()

    def must_hand_over(self) -> bool:
        """Wait for rank 0's answer. Returns whether it is HAND_OVER."""
        return self.ask() == HAND_OVER
