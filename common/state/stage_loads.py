"""The load of each service, which autoscalers ask for: one read of the store, equal on every coordinator."""

from __future__ import annotations

from redis.asyncio import Redis

from common.scaling import StageLoad
from common.state.connection import Arguments, run_script


class StageLoads:
    """Reads loads. A request of a service at which nothing was measured yet counts `assumed_seconds`."""

    def __init__(self, redis: Redis, assumed_seconds: float) -> None:
        self._redis = redis
        self._assumed_seconds = assumed_seconds

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
