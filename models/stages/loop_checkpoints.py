"""When a denoising loop sends its step checkpoint, and how it ends where its worker leaves."""

from __future__ import annotations

import time

from common.errors import HandedOver
from common.stage import Call
from models.runtime import Runtime
from models.stages.loop_state import LoopState


class LoopCheckpoints:
    """Sends the step checkpoints of one loop of `total` steps, which begins at the state's step."""

    def __init__(self, state: LoopState, total: int, runtime: Runtime, call: Call) -> None:
        self._state = state
        self._total = total
        self._every, self._seconds = runtime.step_checkpoint_every, runtime.step_checkpoint_seconds
        self._call = call
        self._sent = state.step
        self._sent_at = time.monotonic()

    def send_if_due(self) -> None:
        """Send a checkpoint where enough steps, or seconds, have passed since the last one; none at the end."""
        done = self._state.step
        old = 0 < self._seconds <= time.monotonic() - self._sent_at
        if (old or (self._every > 0 and done % self._every == 0)) and done < self._total:
            self.send()

    def send(self) -> None:
        """Send a checkpoint."""
        self._sent, self._sent_at = self._state.step, time.monotonic()
        self._call.checkpoint(self._state.step_checkpoint())

    def hand_over_if_asked(self) -> None:
        """End the loop where the worker leaves: send a checkpoint, unless the receiver has it, and raise HandedOver."""
        if not self._call.must_hand_over():
            return
        if self._state.step > self._sent:
            self.send()
        raise HandedOver(f"this worker leaves; the loop is handed over after {self._state.step} steps")
