"""Polls the store for free memory and for repairs of damaged entries, while the coordinator runs."""

from __future__ import annotations

from common.logs import get_logger
from common.metrics import STORE_BYTES, STORE_LIMIT_BYTES, STORE_REPAIRS
from common.rpc.fleet_server import FleetServer
from common.state.redis_client import Redis
from common.state.store_server import StoreMemory, read_repairs, repair_kinds

SUBMIT_HEALTH = "fleet.v1.GenerationService/Submit"
"""Health-check name of Submit: NOT_SERVING while the store is full. RPCs other than Submit and Generate still work."""

_log = get_logger(__name__)


class StoreWatch:
    """Updates metrics and the health of Submit, and logs each change."""

    def __init__(self, redis: Redis, memory: StoreMemory, server: FleetServer) -> None:
        self._redis = redis
        self._memory = memory
        self._server = server
        self._was_full = False
        self._repairs: dict[str, int] | None = None

    async def poll(self) -> None:
        """Read the state of the store once. Raises Unavailable."""
        use = await self._memory.use()
        STORE_BYTES.set(use.used)
        STORE_LIMIT_BYTES.set(use.limit)
        if use.is_full and not self._was_full:
            _log.error("request store is full, Submit is refused until results expire", used=use)
        elif self._was_full and not use.is_full:
            _log.warning("request store has free memory again, Submit is served", used=use)
        self._was_full = use.is_full
        await self._server.set_method_ready(SUBMIT_HEALTH, not use.is_full)
        await self._report_repairs()

    async def _report_repairs(self) -> None:
        """Export all repairs as metrics, and log the repairs since the previous poll."""
        repairs = await read_repairs(self._redis)
        known = repairs if self._repairs is None else self._repairs
        for kind in repair_kinds():
            STORE_REPAIRS.labels(kind).set(repairs.get(kind, 0))
        for kind, count in repairs.items():
            if count > known.get(kind, 0):
                more = count - known.get(kind, 0)
                _log.error("damaged entries removed from the request store", kind=kind, count=more)
        self._repairs = repairs
