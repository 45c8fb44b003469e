"""Slots: the right to run one request on one worker of a service.

They are handed out by priority; within one in turn to the callers, so that each gets an equal share of the work
whatever it has waiting; and to each caller by deadline and arrival.

The store hands a slot that is given back straight to who is next, so that nobody polls. A claim still asks again now
and then, which heals lost messages, dead workers and dead coordinators.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

from common.errors import Unavailable
from common.logs import get_logger
from common.state.connection import Arguments, run_script
from common.state.presence import Presence
from common.state.redis_client import Redis
from common.wiring import Wiring, fault_of
from fleet.v1 import worker_pb2

_ASK_AGAIN_SECONDS = 1.0
_RETRY_SECONDS = 0.5
_CLOSE_SECONDS = 1.0

_log = get_logger(__name__)


class NoWorkers(Unavailable):
    """No live worker serves the model's service, or none that can take the request."""


@dataclass(frozen=True)
class QueuePriority:
    """What decides a claim's place in the queue.

    `deadline_ms` is since the epoch, 0 for none. `cost` says how much the request asks of the service, beside others.
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
    """The compute seconds of a call, as the worker reported them, and the steps of the request before and after it.

    `steps_after` is None for a call that did all steps that were left.
    """

    seconds: float
    steps_before: int = 0
    steps_after: int | None = None

    def arguments(self) -> tuple[str | int, ...]:
        """The values that the store takes."""
        after = () if self.steps_after is None else (self.steps_after,)
        return (f"{self.seconds:.6f}", self.steps_before, *after)


@dataclass(frozen=True)
class WorkerSlot:
    """The right to run a request on `worker`, until it is released."""

    ticket: str
    place: str
    worker: worker_pb2.WorkerInfo


@dataclass
class _Claim:
    """What a claim asks for, and when a worker that can take it was last seen, in seconds of the event loop's clock."""

    place: str
    queue_priority: QueuePriority
    patience_seconds: float | None
    wiring: Wiring | None
    on_no_workers: Callable[[str], None]
    last_seen: float


class WorkerSlots:
    """Claims and releases slots for one coordinator, whose presence must have been started."""

    def __init__(self, redis: Redis, presence: Presence, *, ask_again_seconds: float = _ASK_AGAIN_SECONDS) -> None:
        self._redis = redis
        self._owner = presence.owner
        self._ask_again_seconds = ask_again_seconds
        self._waiting: dict[str, asyncio.Future[bytes]] = {}
        self._tickets: set[str] = set()  # that wait, are held, or are being given back
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
        """Wait for a slot; when it is free at once, that is one round trip.

        `alone` claims all slots of one worker, and waits for a worker that is idle. `first` is for a request
        that was handed over: the claim goes first of its priority. `equal_to` is the numerics fingerprint that its
        checkpoint needs: the claim waits for a worker with that fingerprint for as long as one is live. Only a worker
        that fits the `wiring` gets the claim. `on_no_workers` is called when no such worker is live, with why another
        one does not fit, or an empty text. Waits for a store that is unavailable. Raises NoWorkers when for
        `patience_seconds` there was no such worker at all (None waits for ever). An abandoned claim leaves the queue.
        """
        last_seen = asyncio.get_running_loop().time()
        claim = _Claim(f"{model}/{service}", queue_priority, patience_seconds, wiring, on_no_workers, last_seen)
        digest = f"wiring:{wiring.digest}" if wiring else ""
        while True:
            wishes = (
                "first" if first else "",
                f"equal:{equal_to}" if equal_to else "",
                digest,
                "alone" if alone else "",
            )
            ticket = "/".join((request_id, self._owner, str(next(self._numbers)), *filter(None, wishes)))
            slot = await self._claim_once(ticket, claim)
            fault = fault_of(slot.worker, wiring) if wiring else ""
            if not fault:
                return slot
            # Granted by a process of the last release, which compares no contracts. The request keeps its place.
            _log.info("slot of an incompatible worker returned", worker=slot.worker.worker_id, fault=fault)
            first = True
            await self._refuse(slot)

    async def _refuse(self, slot: WorkerSlot) -> None:
        """Give a slot back, and get none of its worker for a while."""
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
        while True:
            try:
                reply = await run_script(self._redis, "claim", arguments)
            except Unavailable as error:
                _log.warning("claim of a worker slot waits for the request store", place=place, error=error)
                await asyncio.sleep(_RETRY_SECONDS)
                claim.last_seen = loop.time()
                continue
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
        """Get no slot of a worker for a while, of which other coordinators still do; returns the seconds.

        The pause doubles with each call, until a request succeeds there. Raises Unavailable without a store.
        """
        pause_ms = await run_script(self._redis, "avoid", {"owner": self._owner, "worker": worker_id})
        return int(pause_ms) / 1_000

    def release(self, slot: WorkerSlot, used_seconds: float = 0.0, computed: Computed | None = None) -> None:
        """Give a slot back; it goes to who is next. Done in the background, and for as long as the store is away.

        `used_seconds`, unless 0, is what a request took from beginning to end: the service's pace is measured by it.
        `computed` is what the worker reported of it.
        """
        self._release(slot.ticket, slot.place, used_seconds, computed)

    def _release(self, ticket: str, place: str, used_seconds: float = 0.0, computed: Computed | None = None) -> None:
        self._tickets.add(ticket)
        task = asyncio.create_task(self._keep_releasing(ticket, place, used_seconds, computed))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _keep_releasing(self, ticket: str, place: str, used_seconds: float, computed: Computed | None) -> None:
        arguments: Arguments = {
            "ticket": ticket,
            "place": place,
            "used": math.ceil(used_seconds * 1_000),
            "computed": () if computed is None else computed.arguments(),
        }
        while True:
            try:
                await run_script(self._redis, "release", arguments)
            except Unavailable as error:
                _log.warning("release of a worker slot waits for the request store", place=place, error=error)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self._tickets.discard(ticket)
                return

    async def give_back_unknown(self, model: str, service: str) -> None:
        """Release what the store holds for this coordinator, but nobody here does. Raises Unavailable.

        A network that comes back delivers claims that were given up long ago.
        """
        place = f"{model}/{service}"
        known = set(self._tickets)  # some of them may be given back before the reply is read
        for ticket in await run_script(self._redis, "claims", {"place": place, "owner": self._owner}):
            if ticket.decode() not in known | self._tickets:
                _log.warning("unknown worker slot released", place=place, ticket=ticket.decode())
                self._release(ticket.decode(), place)

    async def settle(self) -> None:
        """Wait until all that was released is free."""
        await asyncio.gather(*self._releases)

    async def close(self) -> None:
        """Settle if the store is there; what is not given back then is free once the presence ends."""
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
            f"no worker of {place} can take the request, and none came within {patience:g} s: {fault}; run workers and "
            "coordinators of one release, or of two consecutive ones"
        )
    return NoWorkers(f"no worker serves {place}, and none came within {patience:g} s")
