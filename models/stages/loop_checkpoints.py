"""Step checkpoints of a denoising loop, and its hand-over when its worker shuts down."""

from __future__ import annotations

import time

from common.errors import HandedOver
from common.stage import Call
from models.runtime import Runtime
from models.stages.loop_state import LoopState


class LoopCheckpoints:
    """Sends the step checkpoints of one loop of `total` steps, which starts at the state's step."""

    def __init__(self, state: LoopState, total: int, runtime: Runtime, call: Call) -> None:
        self._state = state
        self._total = total
        self._every, self._seconds = runtime.step_checkpoint_every, runtime.step_checkpoint_seconds
        self._call = call
        self._sent_step = state.step
        self._sent_at = time.monotonic()

    def send_if_due(self) -> None:
        """Send a checkpoint if the step interval or the time interval has elapsed; never after the last step."""
        done = self._state.step
        old = 0 < self._seconds <= time.monotonic() - self._sent_at
        if (old or (self._every > 0 and done % self._every == 0)) and done < self._total:
            self.send()

    def send(self) -> None:
        """Send a checkpoint of the current state."""
        self._sent_step, self._sent_at = self._state.step, time.monotonic()
        self._call.checkpoint(self._state.step_checkpoint())

    def hand_over_if_asked(self) -> None:
        """Raise HandedOver if the worker shuts down.

        First sends a checkpoint if the loop has taken a step since its last checkpoint, or since its start.
        """
        if not self._call.must_hand_over():
            return
        if self._state.step > self._sent_step:
            self.send()
        raise HandedOver(f"the worker shuts down; the loop was handed over after {self._state.step} steps")
