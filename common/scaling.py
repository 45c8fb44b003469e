"""The load of a stage, and the value from which an autoscaler computes how many workers it needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageWork:
    """The work of a request at a service: `steps`, each with so many `tokens`.

    Requests of one `shape` take equally long for a step. `tokens` compares shapes: pixels over all outputs and branches
    where the work grows with them, else 1.
    """

    steps: int
    tokens: int
    shape: str

    def __str__(self) -> str:
        return f"{self.steps}|{self.tokens}|{self.shape}"


@dataclass(frozen=True)
class StageLoad:
    """The load of one stage of a model. Seconds are compute seconds on one worker: remaining steps times pace.

    `workers_held` counts the workers that run a request, `waiting_claims` the requests that wait for a worker there.
    `open_requests` counts the requests that have not ended and still need the stage. `unmeasured` is whether an
    assumed pace entered the sums, since no request of the model was measured at the stage yet.
    """

    workers_held: int
    running_seconds: float
    waiting_claims: int
    waiting_seconds: float
    open_requests: int
    unmeasured: bool = False

    @property
    def queued_seconds(self) -> float:
        """Seconds of work that wait or run."""
        return self.running_seconds + self.waiting_seconds

    @property
    def is_active(self) -> bool:
        """Whether the stage needs at least one worker."""
        return self.open_requests > 0

    def wanted_seconds(self, target_seconds: float) -> float:
        """The scaler value: divided by `target_seconds` and rounded up, it is the number of workers to have.

        A worker that runs a request counts as one, so that it is never scaled away. A waiting request counts as at
        most one, however long it is, since it can only run on one worker.
        """
        waiting = min(self.waiting_seconds, target_seconds * self.waiting_claims)
        return target_seconds * self.workers_held + waiting
