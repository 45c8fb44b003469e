"""Keeps the ranks of a group in step: rank 0 decides when a call stops, and sends each decision to the followers.

A stage asks its Call whether to continue at each step, at each emitted item, and in between. All ranks run the same
code on equal inputs, so that they ask equally often, and rank 0's answer to the n-th question holds on every rank. A
rank that stopped by its own clock or event would leave the others waiting in a collective. An answer costs rank 0 one
small send per follower. A follower waits only while rank 0 is behind; no answer synchronizes with the device.
behind them: the device is not asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common.errors import Cancelled, DeadlineExceeded, FleetError
from common.stage import STEP_CHECKPOINTS, Call

CONTINUE = b""
"""The answer to continue; other answers are outcome() of the error that ends the stage, or HAND_OVER."""

HAND_OVER = b"hand over"
"""The answer to must_hand_over() that ends a stage at the current step boundary."""

_STOPS: dict[str, type[FleetError]] = {kind.__name__: kind for kind in (Cancelled, DeadlineExceeded)}


def outcome(error: FleetError) -> bytes:
    """An error in a form that ranks can compare: kind and message."""
    return f"{type(error).__name__}\n{error.message}".encode()


def stop_of(answer: bytes) -> FleetError:
    """The error in an answer. Raises ValueError for an error that rank 0 does not send."""
    kind, _, message = answer.decode().partition("\n")
    if kind not in _STOPS:
        raise ValueError(f"{kind!r} does not stop a call")
    return _STOPS[kind](message)


@dataclass(frozen=True)
class LeadingCall(Call):
    """Rank 0's call: decides by cancellation and deadline, and sends each answer before acting on it."""

    send: Callable[[bytes], None] = field(kw_only=True)

    def check_cancelled(self) -> None:
        """Raise as Call does, on all ranks."""
        try:
            super().check_cancelled()
        except (Cancelled, DeadlineExceeded) as error:
            self.send(outcome(error))
            raise
        self.send(CONTINUE)

    def emit(self, slot: str, artifact: Any, index: int | None = None) -> None:
        """Emit an item, or raise as Call does, on all ranks: a slow reader blocks rank 0 until the call is cancelled.

        Step checkpoints never block, and ranks with different clocks send them at different steps.
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
        """Decide for all ranks."""
        decided = super().must_hand_over()
        self.send(HAND_OVER if decided else CONTINUE)
        return decided


@dataclass(frozen=True)
class FollowingCall(Call):
    """A follower's call: continues and stops with rank 0, and discards progress and items."""

    ask: Callable[[], bytes] = field(kw_only=True)

    def check_cancelled(self) -> None:
        """Wait for rank 0's answer, and raise its error if it has one."""
        if answer := self.ask():
            raise stop_of(answer)

    def emit(self, slot: str, artifact: Any, index: int | None = None) -> None:
        """Wait until rank 0 has emitted the item, or raise its error. Only rank 0 sends step checkpoints."""
        del artifact, index
        if slot != STEP_CHECKPOINTS:
            self.check_cancelled()

    def must_hand_over(self) -> bool:
        """Wait for rank 0's answer."""
        return self.ask() == HAND_OVER
