"""The load of each service, which autoscalers ask for: one read of the store, equal on every coordinator."""

from __future__ import annotations

from dataclasses import dataclass

from common.scaling import StageLoad
from common.state.connection import Arguments, run_script
from common.state.redis_client import Redis


@dataclass(frozen=True)
class StageActivity:
    """Whether an open request still needs a service, and when one last ceased to, in ms of the store; 0 for never."""

    is_active: bool
    last_needed_ms: int


class StageLoads:
    """Reads loads. A request of a service at which nothing was measured yet counts `assumed_seconds`."""

    def __init__(self, redis: Redis, assumed_seconds: float) -> None:
        self._redis = redis
        self._assumed_seconds = assumed_seconds

    async def activity(self, model: str, service: str) -> StageActivity:
        """Whether a service of a model needs a worker. Raises Unavailable when the store is unavailable."""
        is_active, last_needed = await run_script(self._redis, "stage_activity", {"place": f"{model}/{service}"})
        return StageActivity(is_active=bool(is_active), last_needed_ms=int(last_needed))

    async def read(self, model: str, service: str) -> StageLoad:
        """The load of a service of a model. Raises Unavailable when the store is unavailable."""
        arguments: Arguments = {"place": f"{model}/{service}", "assumed": self._assumed_seconds}
        held, running, claims, waiting, open_requests, unmeasured = await run_script(
            self._redis, "stage_load", arguments
        )
        return StageLoad(
            workers_held=int(held),
            running_seconds=float(running),
            waiting_claims=int(claims),
            waiting_seconds=float(waiting),
            open_requests=int(open_requests),
            unmeasured=bool(unmeasured),
        )
