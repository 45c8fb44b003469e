"""What makes the ranks of a group stop a call at the same place: rank 0 decides, the others are told.

A stage asks its Call whether it should go on, at each step, at each item that it emits, and in between. All ranks run
the same code on equal inputs and so ask equally often, and the answer to the n-th question is rank 0's everywhere. A
rank that stopped by a clock or an event of its own would leave the others in a collective that it never enters. Rank
0's answer costs it one small send to each follower, and followers nothing but what they wait for a rank 0 that is
behind them: the device is not asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common.errors import Cancelled, DeadlineExceeded, FleetError
from common.stage import STEP_CHECKPOINTS, Call

GO_ON = b""
"""The answer that lets a stage go on; any other one is outcome() of the error that ends it."""

HAND_OVER = b"hand over"
"""The answer to must_hand_over() that ends a stage at this step boundary."""

_STOPS: dict[str, type[FleetError]] = {kind.__name__: kind for kind in (Cancelled, DeadlineExceeded)}


def outcome(error: FleetError) -> bytes:
    """An error as the ranks compare it: equal where its kind and its message are."""
    return f"{type(error).__name__}\n{error.message}".encode()


def stop_of(answer: bytes) -> FleetError:
    """The error that an answer asks for. Raises ValueError for one that rank 0 does not give."""
    kind, _, message = answer.decode().partition("\n")
    if kind not in _STOPS:
        raise ValueError(f"{kind!r} does not stop a call")
    return _STOPS[kind](message)


@dataclass(frozen=True)
class LeadingCall(Call):
    """Rank 0's: decides by the caller and the clock, and tells each answer before it acts on it."""

    tell: Callable[[bytes], None] = field(kw_only=True)

    def check_cancelled(self) -> None:
        """Raise as Call does, on all ranks."""
        try:
            super().check_cancelled()
        except (Cancelled, DeadlineExceeded) as error:
            self.tell(outcome(error))
            raise
        self.tell(GO_ON)

    def emit(self, slot: str, artifact: Any, index: int | None = None) -> None:
        """Emit, and raise as Call does, on all ranks: a slow reader delays rank 0 until the call is cancelled.

        Step checkpoints wait for nobody, and ranks whose clocks differ send them at different steps.
        """
        if slot == STEP_CHECKPOINTS:
            super().emit(slot, artifact, index)
            return
        try:
            super().emit(slot, artifact, index)
        except (Cancelled, DeadlineExceeded) as error:
            self.tell(outcome(error))
            raise
        self.tell(GO_ON)

    def must_hand_over(self) -> bool:
        """Decide for all ranks."""
        decided = super().must_hand_over()
        self.tell(HAND_OVER if decided else GO_ON)
        return decided


@dataclass(frozen=True)
class FollowingCall(Call):
    """A follower's: goes on and stops as rank 0 says; what it reports goes nowhere."""

    ask: Callable[[], bytes] = field(kw_only=True)

    def check_cancelled(self) -> None:
        """Wait for rank 0's answer, and raise what it says."""
        if answer := self.ask():
            raise stop_of(answer)

    def emit(self, slot: str, artifact: Any, index: int | None = None) -> None:
        """Wait until rank 0 has emitted the item, and raise what it says. It alone sends step checkpoints."""
        del artifact, index
        if slot != STEP_CHECKPOINTS:
            self.check_cancelled()

    def must_hand_over(self) -> bool:
        """Wait for rank 0's answer."""
        return self.ask() == HAND_OVER
