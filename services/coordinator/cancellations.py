"""Cancels requests in the store, and counts requests that end there because no coordinator runs them."""

from __future__ import annotations

import secrets

from common.errors import FleetError, Unavailable
from common.log_context import log_scope
from common.logs import get_logger
from common.metrics import REQUEST_SECONDS, REQUESTS, observe
from common.state.requests import RequestStore
from common.trace_context import entered
from fleet.v1 import generation_pb2
from services.coordinator.request_trace import RequestTrace
from services.coordinator.service_gauges import state_label
from services.coordinator.state_lines import log_state

_MOST_UNSETTLED = 1_000

_log = get_logger(__name__)


class Cancellations:
    """Cancellations of one coordinator.

    An attempt is unsettled if the store's reply is lost, or if the RPC is cancelled before the reply. settle() repeats
    unsettled attempts with the same token, so that each request that they end is counted exactly once. Beyond 1,000
    unsettled attempts, the oldest is dropped.
    """

    def __init__(self, store: RequestStore) -> None:
        self._store = store
        self._unsettled: dict[str, str] = {}

    async def cancel(self, request_id: str) -> generation_pb2.RequestRecord:
        """Ask the owner of a request to cancel it; without a live owner, end the request in the store.

        Raises NotFound, Unavailable.
        """
        token = self._unsettled.setdefault(request_id, secrets.token_hex(8))
        while len(self._unsettled) > _MOST_UNSETTLED:
            del self._unsettled[next(iter(self._unsettled))]
        return await self._attempt(request_id, token)

    async def settle(self) -> None:
        """Repeat unsettled attempts. Stops when the store is unavailable."""
        for request_id, token in list(self._unsettled.items()):
            with log_scope(request_id=request_id):
                try:
                    await self._attempt(request_id, token)
                except Unavailable:
                    return
                except FleetError as error:
                    _log.error("cancellation given up", error=error)

    async def _attempt(self, request_id: str, token: str) -> generation_pb2.RequestRecord:
        try:
            record, ended_here = await self._store.request_cancel(request_id, token=token)
        except FleetError as error:
            if not isinstance(error, Unavailable):
                self._forget(request_id, token)
            raise
        # Concurrent attempts share a token, so the store reports to each of them that it ended the request.
        if self._forget(request_id, token) and ended_here:
            _count_end(record)
        return record

    def _forget(self, request_id: str, token: str) -> bool:
        """Remove a settled attempt; False if a concurrent attempt already removed it."""
        if self._unsettled.get(request_id) != token:
            return False
        del self._unsettled[request_id]
        return True


def _count_end(record: generation_pb2.RequestRecord) -> None:
    """Count a request that ended in the store, and end the root span of its trace."""
    name = state_label(record.state)
    trace = RequestTrace.resume(record)
    seconds = (record.updated_at.ToNanoseconds() - record.created_at.ToNanoseconds()) / 1e9
    with log_scope(request_id=record.request_id, model=record.model), entered(trace.root):
        REQUESTS.labels(record.model, name).inc()
        observe(REQUEST_SECONDS.labels(record.model, name), seconds)
        log_state(record.state)
    trace.end(record.state)
