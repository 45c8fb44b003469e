"""Invariants after a chaos run. Each check returns findings, which are messages about violated invariants."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil
from chaos_clients import Outcome
from chaos_plan import Behavior, MediaRequest
from chaos_processes import COORDINATOR, Fleet, Process, Role
from redis.asyncio import Redis

from common.state.connection import command
from common.state.records import SNAPSHOT, is_terminal, read_event, read_record
from fleet.v1 import generation_pb2 as pb

State = pb.RequestState

# Store keys that have no TTL by design, with their contents.
PERMANENT = {
    "fleet:requests": "index of requests; entries are removed after their record has expired",
    "fleet:ended": "ids of ended requests by the expiry time of their record; expired ids are removed",
    "fleet:sequence": "latest number of a request or of a queue entry",
}
_KEYS_OF_OPEN_REQUESTS = ("fleet:slots:", "fleet:waiting:", "fleet:queue:", "fleet:open", "fleet:work:")
"""Prefixes of keys that exist only while requests are open."""
_LASTING_FIELDS = {*SNAPSHOT, "model", "owner", "epoch", "cancel", "key", "caller", "variant", "token"}
"""Fields that the record of an ended request may have."""
_MOST_STORE_CONNECTIONS = 40
"""Largest number of connections of a process to the store."""
_SETTLE_SECONDS = 30.0


@dataclass
class Stored:
    """A request in the store at the end of the run."""

    record: pb.RequestRecord
    events: list[pb.Event]
    epoch: int


async def read_store(redis: Redis) -> dict[str, Stored]:
    """Read every accepted request, by id."""
    found: dict[str, Stored] = {}
    for name in await command(redis, "ZRANGE", "fleet:requests", 0, -1):
        request_id = name.decode()
        *record, epoch = await command(redis, "HMGET", f"fleet:request:{request_id}", *SNAPSHOT, "epoch")
        rows = await command(redis, "XRANGE", f"fleet:events:{request_id}", "-", "+")
        events = [read_event(event_id.decode(), fields[b"event"]) for event_id, fields in rows]
        found[request_id] = Stored(read_record(record), events, int(epoch))
    return found


def check_requests(stored: Mapping[str, Stored], outcomes: Sequence[Outcome], known: Collection[str]) -> list[str]:
    """Check that every request ended once, as its order allows, and that its client received all events.

    `known` are ids of requests that the run itself submitted, such as the requests of the warm-up.
    """
    findings: list[str] = []
    for name, each in stored.items():
        ends = [event.state_change.state for event in each.events if is_terminal(event.state_change.state)]
        last = each.events[-1].state_change.state if each.events else State.REQUEST_STATE_UNSPECIFIED
        if ends != [each.record.state] or last != each.record.state:
            recorded = [State.Name(state) for state in ends]
            findings.append(
                f"request {name} is {State.Name(each.record.state)}, but its events have the ends {recorded}"
            )
        begun = [event for event in each.events if event.state_change.state == State.REQUEST_STATE_RUNNING]
        if len(begun) > 1:
            findings.append(f"request {name} has the state RUNNING {len(begun)} times")
    for outcome in outcomes:
        findings += _check_outcome(stored, outcome)
    return findings + _check_strays(stored, outcomes, known)


def _check_outcome(stored: Mapping[str, Stored], outcome: Outcome) -> list[str]:
    order, name = outcome.order, outcome.request_id
    if not name:
        return [] if outcome.gave_up else [f"order {order.number} was never accepted"]
    if name not in stored:
        return [f"request {name} of order {order.number} was accepted, but is not in the store"]
    each = stored[name]
    if each.record.caller != order.caller:
        return [f"request {name} has the caller {each.record.caller}, but order {order.number} has {order.caller}"]
    permitted = {State.REQUEST_STATE_SUCCEEDED}
    if outcome.gave_up and order.behavior in (Behavior.CANCEL, Behavior.LEAVE):
        permitted.add(State.REQUEST_STATE_CANCELLED)
    if order.behavior is Behavior.POISON:
        permitted = {State.REQUEST_STATE_FAILED}
    if order.behavior is Behavior.HURRY:
        permitted.add(State.REQUEST_STATE_EXPIRED)
    if each.record.state not in permitted:
        why = each.record.error.message
        return [f"request {name} of order {order.number} is {State.Name(each.record.state)}, unexplained: {why}"]
    if order.behavior is Behavior.LEAVE:
        return []
    received, recorded = [event.event_id for event in outcome.received], [event.event_id for event in each.events]
    if received != recorded:
        return [f"the client of request {name} received the events {received}, but the store has {recorded}"]
    return []


def _check_strays(stored: Mapping[str, Stored], outcomes: Sequence[Outcome], known: Collection[str]) -> list[str]:
    """Check the requests whose id no client knows.

    They must be SUCCEEDED or CANCELLED, and at most as many as the clients' lost replies to submissions.
    """
    lost = sum(outcome.lost_replies for outcome in outcomes)
    strays = stored.keys() - {outcome.request_id for outcome in outcomes} - set(known)
    findings = [
        f"request {name}, whose id no client knows, is {State.Name(stored[name].record.state)}"
        for name in sorted(strays)
        if stored[name].record.state not in (State.REQUEST_STATE_SUCCEEDED, State.REQUEST_STATE_CANCELLED)
    ]
    if len(strays) > lost:
        findings.append(
            f"no client knows the ids {sorted(strays)}, but clients lost only {lost} replies to submissions"
        )
    return findings


def check_files(
    name: str, record: pb.RequestRecord, files: Sequence[bytes], references: Mapping[MediaRequest, Sequence[bytes]]
) -> list[str]:
    """Check that a result equals the reference of the same request byte for byte."""
    given = record.parameters
    (media_request,) = [each for each in references if (each.model, each.seed) == (record.model, given.seed)]
    if list(files) == list(references[media_request]):
        return []
    sizes = [len(file) for file in files]
    return [f"the result of request {name} ({media_request}) has other bytes than its reference; sizes are {sizes}"]


async def check_store(redis: Redis, permitted_fields: tuple[str, ...] = ()) -> list[str]:
    """Check that no worker slot, queue entry or open request is left.

    All keys except PERMANENT must have a TTL. Redis deletes empty keys. Therefore the keys of worker slots, queues,
    open requests and their work must not exist. A record must not have fields that only an open request needs, except
    fields that start with one of `permitted_fields`.
    """
    findings: list[str] = []
    for key in sorted(each.decode() for each in await command(redis, "KEYS", "*")):
        if key.startswith("fleet:request:"):
            fields = {field.decode() for field in await command(redis, "HKEYS", key)}
            fields = {field for field in fields if not field.startswith(permitted_fields)}
            findings += [
                f"the store still has the field {field} of {key}" for field in sorted(fields - _LASTING_FIELDS)
            ]
        if key.startswith(_KEYS_OF_OPEN_REQUESTS):
            findings.append(f"the store still has {key}")
        elif key not in PERMANENT and await command(redis, "PTTL", key) == -1:
            findings.append(f"the store has {key} without a TTL")
        elif key.startswith("fleet:checkpoint:"):
            step_checkpoint_key = await command(redis, "HGET", f"fleet:request:{key.split(':')[2]}", "point")
            if step_checkpoint_key is not None:
                findings.append(f"the store still has {key} as a step checkpoint")
    return findings


class Descriptors(NamedTuple):
    """Number of open file descriptors of a process by type; `own` counts all other types."""

    to_store: int
    to_workers: int
    accepted: int
    own: int


def descriptors(process: Process) -> Descriptors:
    """Count the file descriptors of a process."""
    view = psutil.Process(process.pid)
    total = view.num_fds()
    remote = [each.raddr.port for each in view.net_connections("tcp") if each.raddr]
    to_store = remote.count(process.store.port)
    local = [each for each in view.net_connections("unix") if str(each.laddr) == str(process.socket)]
    accepted = len(local) - 1  # without the listening socket
    return Descriptors(to_store, len(remote) - to_store, accepted, total - len(remote) - accepted)


@dataclass
class Baseline:
    """File descriptors per role before the first fault."""

    own: dict[Role, int] = field(default_factory=dict)

    def measure(self, fleet: Fleet) -> None:
        """Measure all processes of the fleet."""
        for process in fleet.living:
            own = descriptors(process).own
            self.own[process.role] = max(own, self.own.get(process.role, 0))

    def exceeded(self, fleet: Fleet) -> list[str]:
        """Return findings for processes with more descriptors or connections than expected."""
        workers = len([each for each in fleet.living if each.role != COORDINATOR])
        coordinators = len([each for each in fleet.living if each.role == COORDINATOR])
        findings: list[str] = []
        for process in fleet.living:
            found = descriptors(process)
            accepted = 0 if process.role == COORDINATOR else coordinators
            bound = Descriptors(_MOST_STORE_CONNECTIONS, workers, accepted, self.own[process.role])
            if any(has > most for has, most in zip(found, bound, strict=True)):
                findings.append(f"{process.name} has {found}, but at most {bound} are expected")
        return findings


async def settled(
    fleet: Fleet, redis: Redis, baseline: Baseline | None, permitted_fields: tuple[str, ...] = ()
) -> list[str]:
    """Poll until the store and processes are clean; returns the findings that remain after a timeout.

    Without a baseline, file descriptors are not compared. `permitted_fields`: see check_store().
    """
    loop = asyncio.get_running_loop()
    give_up = loop.time() + _SETTLE_SECONDS
    while True:
        findings = await check_store(redis, permitted_fields) + (baseline.exceeded(fleet) if baseline else [])
        if not findings or loop.time() > give_up:
            return findings
        await asyncio.sleep(0.2)


def check_logs(logs: Mapping[str, Path]) -> list[str]:
    """Check that logs have no tracebacks. gRPC logs an expected traceback if a client disconnects during a write."""
    findings: list[str] = []
    for name, log in logs.items():
        text = log.read_text(errors="replace").splitlines() if log.exists() else []
        wrong = [line for line in text if "Traceback" in line and "logger=grpc._cython.cygrpc" not in line]
        findings += [f"{name} logs {line}" for line in wrong]
    return findings


def lines_about(fleet: Fleet, names: Sequence[str]) -> list[str]:
    """Log lines of all processes that contain one of `names` or an error."""
    wanted = re.compile("|".join([*map(re.escape, names), "Traceback", " ERROR ", " CRITICAL "]))
    lines: list[str] = []
    for process in fleet.all:
        if process.log.exists():
            text = process.log.read_text(errors="replace").splitlines()
            lines += [f"{process.name}: {line}" for line in text if wanted.search(line)]
    return lines
