"""The load of a service, and the metric from which an autoscaler computes the number of workers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageWork:
    """Work of a request at a service: `steps` steps of `tokens` tokens each.

    Steps of requests with equal `shape` take equally long. `tokens` is the relative size of a step, by which shapes
    are compared: the number of pixels of all outputs (Cost.PIXEL), of all outputs and guidance branches
    (Cost.PIXEL_STEP), or 1 (Cost.REQUEST).
    """

    steps: int
    tokens: int
    shape: str

    def __str__(self) -> str:
        return f"{self.steps}|{self.tokens}|{self.shape}"


@dataclass(frozen=True)
class StageLoad:
    """Load of one service of a model. Seconds are compute seconds on one worker: remaining steps times pace.

    `workers_held`: workers that run a request. `waiting_claims`: requests that wait for a worker of the service.
    `open_requests`: requests that have not ended and still need the service. `unmeasured`: the seconds contain assumed
    durations, because no pace of the service is measured.
    """

    workers_held: int
    running_seconds: float
    waiting_claims: int
    waiting_seconds: float
    open_requests: int
    unmeasured: bool = False

    @property
    def queued_seconds(self) -> float:
        """Compute seconds of waiting and running work."""
        return self.running_seconds + self.waiting_seconds

    @property
    def is_active(self) -> bool:
        """Whether the service needs at least one worker."""
        return self.open_requests > 0

    def wanted_seconds(self, target_seconds: float) -> float:
        """Return the scaler metric. Divided by `target_seconds` and rounded up, it is the desired number of workers.

        Each worker that runs a request counts as one worker, so that it is not removed. The number of workers for the
        waiting requests is at most the number of these requests, because a request can run on only one worker.
        """
        waiting = min(self.waiting_seconds, target_seconds * self.waiting_claims)
        return target_seconds * self.workers_held + waiting
