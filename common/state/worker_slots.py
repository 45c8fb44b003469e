"""Worker slots: permits to run one request on one worker of a service.

Worker slots are granted by priority, then by fair queueing over callers, then by deadline and arrival of each caller's
requests.

The store grants a released worker slot directly to the next claim and publishes the grant. In addition, waiting claims
are repeated at a low rate, which recovers from lost messages, lost workers and lost coordinators.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote

from common.errors import Unavailable
from common.logs import get_logger
from common.state.connection import Arguments, run_script
from common.state.presence import Presence
from common.state.redis_client import Redis
from common.state.retries import retry_until_available
from common.wiring import Wiring, fault_of
from fleet.v1 import worker_pb2

_ASK_AGAIN_SECONDS = 1.0
_RETRY_SECONDS = 0.5
_CLOSE_SECONDS = 1.0

_log = get_logger(__name__)


class NoWorkers(Unavailable):
    """No live worker serves the service of the model, or no live worker can run the request."""


@dataclass(frozen=True)
class QueuePriority:
    """Properties of a claim that determine its queue position.

    `deadline_ms` is in ms since 1970, 0 for none. `cost` is the relative work of the request at the service.
    """

    priority: int = 0
    deadline_ms: int = 0
    caller: str = ""
    cost: int = 1


FIRST_COME = QueuePriority()


def _ignore(_: str) -> None:
    return None


@dataclass(frozen=True)
class Computed:
    """Compute seconds of a call, as the worker reports them, and the completed steps of the request.

    `steps_before` and `steps_after` are steps before and after the call. `steps_after` is None for a call that computed
    all remaining steps.
    """

    seconds: float
    steps_before: int = 0
    steps_after: int | None = None

    def arguments(self) -> tuple[str | int, ...]:
        """Return the values of the script's argument `computed`."""
        after = () if self.steps_after is None else (self.steps_after,)
        return (f"{self.seconds:.6f}", self.steps_before, *after)


@dataclass(frozen=True)
class WorkerSlot:
    """Permit to run a request on `worker`, until it is released."""

    ticket: str
    place: str
    worker: worker_pb2.WorkerInfo


@dataclass
class _Claim:
    """Parameters of a claim. `last_seen` is the event loop time at which a compatible worker was last live."""

    place: str
    queue_priority: QueuePriority
    patience_seconds: float | None
    wiring: Wiring | None
    on_no_workers: Callable[[str], None]
    last_seen: float


class WorkerSlots:
    """Claims and releases worker slots for one coordinator. Start the coordinator's Presence first."""

    def __init__(self, redis: Redis, presence: Presence, *, ask_again_seconds: float = _ASK_AGAIN_SECONDS) -> None:
        self._redis = redis
        self._owner = presence.owner
        self._ask_again_seconds = ask_again_seconds
        self._waiting: dict[str, asyncio.Future[bytes]] = {}
        self._tickets: set[str] = set()  # tickets that wait, hold a worker slot, or are being released
        self._numbers = itertools.count()
        self._releases: set[asyncio.Task[None]] = set()
        presence.on_grant = self._granted

    async def claim(
        self,
        model: str,
        service: str,
        request_id: str,
        queue_priority: QueuePriority = FIRST_COME,
        *,
        patience_seconds: float | None = None,
        alone: bool = False,
        first: bool = False,
        equal_to: str = "",
        wiring: Wiring | None = None,
        on_no_workers: Callable[[str], None] = _ignore,
    ) -> WorkerSlot:
        """Wait for a worker slot; one round trip if one is free. Cancellation removes the claim from the queue.

        `patience_seconds`: raise NoWorkers after this time without a compatible live worker; None to wait forever.
        `alone`: claim all worker slots of one idle worker.
        `first`: schedule the claim before other claims of its priority; for a request that was handed over.
        `equal_to`: numerics fingerprint of the request's step checkpoint. While a worker with this fingerprint is live,
        the claim waits for it.
        `wiring`: only worker slots of workers that fit the wiring are granted.
        `on_no_workers`: called when no compatible worker is live, with the fault of one incompatible worker or "".

        While the store is unavailable, the claim is retried.
        """
        last_seen = asyncio.get_running_loop().time()
        claim = _Claim(f"{model}/{service}", queue_priority, patience_seconds, wiring, on_no_workers, last_seen)
        digest = f"wiring:{wiring.digest}" if wiring else ""
        while True:
            constraints = (
                "first" if first else "",
                f"equal:{equal_to}" if equal_to else "",
                digest,
                "alone" if alone else "",
            )
            ticket = "/".join((request_id, self._owner, str(next(self._numbers)), *filter(None, constraints)))
            slot = await self._claim_once(ticket, claim)
            fault = fault_of(slot.worker, wiring) if wiring else ""
            if not fault:
                return slot
            # A process of the previous release granted the worker slot without comparing contracts. Retry before other
            # claims.
            _log.info("worker slot of an incompatible worker released", worker=slot.worker.worker_id, fault=fault)
            first = True
            await self._refuse(slot)

    async def _refuse(self, slot: WorkerSlot) -> None:
        """Release a worker slot, and avoid its worker for a pause."""
        try:
            await self.avoid(slot.worker.worker_id)
        except Unavailable as error:
            _log.warning("worker not avoided", worker=slot.worker.worker_id, error=error)
        finally:
            self.release(slot)

    async def _claim_once(self, ticket: str, claim: _Claim) -> WorkerSlot:
        granted: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = granted
        self._tickets.add(ticket)
        try:
            info = await self._wait(ticket, claim, granted)
            return WorkerSlot(ticket, claim.place, worker_pb2.WorkerInfo.FromString(info))
        except BaseException:
            self._release(ticket, claim.place)
            raise
        finally:
            del self._waiting[ticket]

    async def _wait(self, ticket: str, claim: _Claim, granted: asyncio.Future[bytes]) -> bytes:
        loop, place, patience = asyncio.get_running_loop(), claim.place, claim.patience_seconds
        arguments: Arguments = {
            "ticket": ticket,
            "owner": self._owner,
            "place": place,
            "priority": claim.queue_priority.priority,
            "cost": claim.queue_priority.cost,
            "deadline": claim.queue_priority.deadline_ms,
            "caller": quote(claim.queue_priority.caller, safe=""),
            "wiring": claim.wiring.text if claim.wiring else "",
        }

        def mark_seen() -> None:
            claim.last_seen = loop.time()

        while True:
            reply = await retry_until_available(
                "claim of a worker slot",
                partial(run_script, self._redis, "claim", arguments),
                constant_seconds=_RETRY_SECONDS,
                on_retry=mark_seen,
                place=place,
            )
            if reply[0] == b"granted":
                return bytes(reply[1])
            if int(reply[1]):
                claim.last_seen = loop.time()
            else:
                fault = reply[3].decode(errors="replace")
                claim.on_no_workers(fault)
                if patience is not None and loop.time() - claim.last_seen >= patience:
                    raise _no_workers(place, patience, fault)
            pause = self._ask_again_seconds if patience is None else min(self._ask_again_seconds, max(patience, 0.01))
            if avoided_ms := int(reply[2]):
                pause = min(pause, avoided_ms / 1_000)
            await asyncio.wait({granted}, timeout=pause)
            if granted.done():
                return granted.result()

    async def avoid(self, worker_id: str) -> float:
        """Exclude a worker from grants to this coordinator for a pause. Returns the pause in seconds.

        The pause doubles with each call, up to 5 s. It is reset when a request succeeds on the worker, or at most 60 s
        after the pause has ended. Raises Unavailable.
        """
        pause_ms = await run_script(self._redis, "avoid", {"owner": self._owner, "worker": worker_id})
        return int(pause_ms) / 1_000

    def release(self, slot: WorkerSlot, used_seconds: float = 0.0, computed: Computed | None = None) -> None:
        """Release a worker slot in the background, retried while the store is unavailable.

        `used_seconds`: time for which a successful request held the worker slot, from which the pace is measured; 0
        if the request failed.
        `computed`: compute seconds, if the worker reported them.
        """
        self._release(slot.ticket, slot.place, used_seconds, computed)

    def _release(self, ticket: str, place: str, used_seconds: float = 0.0, computed: Computed | None = None) -> None:
        self._tickets.add(ticket)
        task = asyncio.create_task(self._retry_release(ticket, place, used_seconds, computed))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _retry_release(self, ticket: str, place: str, used_seconds: float, computed: Computed | None) -> None:
        arguments: Arguments = {
            "ticket": ticket,
            "place": place,
            "used": math.ceil(used_seconds * 1_000),
            "computed": () if computed is None else computed.arguments(),
        }
        await retry_until_available(
            "release of a worker slot",
            partial(run_script, self._redis, "release", arguments),
            constant_seconds=_RETRY_SECONDS,
            place=place,
        )
        self._tickets.discard(ticket)

    async def give_back_unknown(self, model: str, service: str) -> None:
        """Release stored worker slots and claims of this coordinator that this process does not know.

        They exist if the store received a claim after the claiming task had ended. Raises Unavailable.
        """
        place = f"{model}/{service}"
        known = set(self._tickets)  # includes tickets that are released before the reply is read
        for ticket in await run_script(self._redis, "claims", {"place": place, "owner": self._owner}):
            if ticket.decode() not in known | self._tickets:
                _log.warning("unknown worker slot released", place=place, ticket=ticket.decode())
                self._release(ticket.decode(), place)

    async def settle(self) -> None:
        """Wait until all releases are complete."""
        await asyncio.gather(*self._releases)

    async def close(self) -> None:
        """Wait up to 1 s for pending releases, then cancel them.

        The store releases their worker slots when the coordinator's heartbeat ends.
        """
        if self._releases:
            await asyncio.wait(self._releases, timeout=_CLOSE_SECONDS)
        for release in self._releases:
            release.cancel()
        await asyncio.gather(*self._releases, return_exceptions=True)

    def _granted(self, ticket: str, info: bytes) -> None:
        waiting = self._waiting.get(ticket)
        if waiting is not None and not waiting.done():
            waiting.set_result(info)


def _no_workers(place: str, patience: float, fault: str) -> NoWorkers:
    if fault:
        return NoWorkers(
            f"no worker of {place} has been able to run the request for {patience:g} s: {fault}; run workers and "
            "coordinators of the same release, or of two consecutive releases"
        )
    return NoWorkers(f"no worker has served {place} for {patience:g} s")
