"""The store scripts of the latest release and of this version on one store, called by both versions.

Each process calls the script of its own version. In any order of operations, no worker exceeds its capacity, no claim
is granted twice, no claim or request is lost, and neither script reports damage in data of the other version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

import script_calls
from async_tests import HANG_SECONDS, poll
from common.state.connection import script_call, script_source
from redis_servers import running_server, server_binaries
from release import release_call, release_script, script_calls_of, unpack_release
from script_calls import LASTS, MODEL, PLACE

OLD, NEW = "old", "new"
MAX_WORKERS = 4
FINGERPRINT = "fingerprint"
CONTRACTS = {"denoising": script_calls.CONTRACT}
TRANSIENT_KEYS = ("slots", "waiting", "queue", "open", "work")
"""Kinds of keys that no longer exist once every request has ended."""


@dataclass(frozen=True)
class Version:
    """A version of the code. `calls` builds arguments of script operations, `command` builds EVALSHA commands."""

    name: str
    calls: ModuleType
    command: Callable[[str, Any], list[Any]]


@dataclass
class Worker:
    """A live worker."""

    name: str
    version: Version
    capacity: int


@dataclass
class Request:
    """An open request, its owner's epoch, and the ticket of the owner's claim."""

    id: str
    epoch: int = 1
    ticket: str = ""
    worker: str = ""


@dataclass
class Coordinator:
    """A live coordinator, with the requests that it owns."""

    name: str
    version: Version
    requests: list[Request] = field(default_factory=list)


@dataclass
class MixedFleet:
    """A fleet of both versions with its expected state, which the checks compare with the store."""

    redis: Any  # redis-py annotates replies with the types of both of its clients
    versions: Mapping[str, Version]
    coordinators: list[Coordinator] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    numbers: Counter[str] = field(default_factory=Counter)

    def start(self) -> None:
        """Start one coordinator and one worker of each version."""
        for version in self.versions.values():
            self.add_coordinator(version)
            self.add_worker(version, 1)

    def run(self, version: Version, operation: str, arguments: Mapping[str, Any]) -> Any:
        """Run an operation of the version's script."""
        return self.redis.execute_command(*version.command(operation, arguments))

    def new_name(self, kind: str) -> str:
        """A name that was not used before."""
        self.numbers[kind] += 1
        return f"{kind}-{self.numbers[kind]}"

    def add_coordinator(self, version: Version) -> None:
        """Start a coordinator, which takes over the requests of dead coordinators."""
        coordinator = Coordinator(self.new_name("c"), version)
        self.coordinators.append(coordinator)
        self.beat(coordinator)
        self.take_over(coordinator)

    def beat(self, coordinator: Coordinator) -> None:
        """Renew a coordinator's heartbeat."""
        self.run(coordinator.version, "beat", {"owner": coordinator.name, "lasts": LASTS})

    def take_over(self, coordinator: Coordinator) -> None:
        """Take over the requests of dead coordinators."""
        running = [request.id for request in coordinator.requests]
        arguments = coordinator.version.calls.take_over(coordinator.name, 1, *running)
        rows, _ = self.run(coordinator.version, "take_over", arguments)
        for row in rows:
            name, submission = row[0].decode(), row[2]
            assert name not in self.owned(), f"{name} was taken over although its owner is live"
            assert name not in self.ended
            assert submission == b"submission"
            coordinator.requests.append(Request(name, int(row[1])))

    def owned(self) -> list[str]:
        """The IDs of the requests of all live coordinators."""
        return [request.id for each in self.coordinators for request in each.requests]

    def add_worker(self, version: Version, capacity: int) -> None:
        """Start a worker, which declares its model and sends a heartbeat."""
        worker = Worker(self.new_name("w"), version, capacity)
        arguments = {"model": MODEL, "fingerprint": FINGERPRINT, "lasts": LASTS}
        if version.name == OLD:
            arguments |= {"contracts": CONTRACTS}
        assert self.run(version, "declare", arguments) == [b"declared"]
        self.workers.append(worker)
        self.announce(worker)

    def announce(self, worker: Worker) -> None:
        """Renew a worker's heartbeat."""
        announcement = worker.version.calls.announcement(worker.name, capacity=worker.capacity)
        self.run(worker.version, "announce", {**announcement, "info": worker.name})

    def leave(self, worker: Worker) -> None:
        """End a worker as SIGTERM does; its running calls complete."""
        self.workers.remove(worker)
        self.run(worker.version, "leaving", {"worker": worker.name, "lasts": LASTS})

    def end_coordinator(self, coordinator: Coordinator, successor: Version, *, is_killed: bool) -> None:
        """End a coordinator, and start another coordinator that takes over its requests."""
        self.coordinators.remove(coordinator)
        if is_killed:
            self.redis.delete(f"fleet:coordinator:{coordinator.name}")  # as when its heartbeat expires
        else:
            self.run(coordinator.version, "resign", {"owner": coordinator.name})
        before = [request.id for request in coordinator.requests]
        self.add_coordinator(successor)
        assert not set(before) - set(self.owned()), "requests of a coordinator that ended are lost"

    def admit(self, coordinator: Coordinator) -> None:
        """Admit a request and claim a worker slot for it."""
        request = Request(self.new_name("r"))
        admission = coordinator.version.calls.admission(request.id, coordinator.name, "ann", costs={"denoising": 5})
        assert self.run(coordinator.version, "admit", admission)[0] == b"admitted"
        coordinator.requests.append(request)
        self.claim(coordinator, request)

    def claim(self, coordinator: Coordinator, request: Request) -> None:
        """Claim a worker slot, or poll a waiting claim."""
        if request.worker:
            return
        request.ticket = request.ticket or f"{request.id}/{coordinator.name}/{self.numbers['t']}"
        self.numbers["t"] += 1
        reply = self.run(
            coordinator.version, "claim", coordinator.version.calls.claim(request.ticket, coordinator.name)
        )
        if reply[0] == b"granted":
            request.worker = reply[1].decode()
        else:
            assert reply[0] == b"waiting"

    def release(self, coordinator: Coordinator, request: Request, used: int) -> None:
        """Release a worker slot, or remove a waiting claim from the queue."""
        arguments = {"ticket": request.ticket, "place": PLACE, "used": used}
        if request.ticket:
            self.run(coordinator.version, "release", arguments)
        request.ticket = request.worker = ""

    def append(self, coordinator: Coordinator, request: Request) -> None:
        """Report progress, and store a step checkpoint."""
        number = self.numbers[f"events of {request.id} {request.epoch}"]
        self.numbers[f"events of {request.id} {request.epoch}"] += 1
        reply = self.run(
            coordinator.version,
            "append",
            {
                "id": request.id,
                "epoch": request.epoch,
                "number": number,
                "state": "2",
                "extra": "",
                "events": ["event"],
            },
        )
        assert reply[0] == b"appended"
        key = f"fleet:checkpoint:{request.id}:{request.epoch}-{number}"
        self.redis.hset(key, "0", "origin")
        arguments = {"id": request.id, "epoch": request.epoch, "checkpoint_key": key, "step": number + 1}
        assert self.run(coordinator.version, "step_checkpoint", arguments) == 1
        assert self.redis.keys(f"fleet:checkpoint:{request.id}:*") == [key.encode()]

    def finish(self, coordinator: Coordinator, request: Request) -> None:
        """End a request; a second end has no effect."""
        self.release(coordinator, request, 40)
        end = {**coordinator.version.calls.end(request.id), "epoch": request.epoch}
        assert self.run(coordinator.version, "finish", end)[0] == b"finished"
        assert self.run(coordinator.version, "finish", {**end, "token": "another"})[0] == b"ended"
        coordinator.requests.remove(request)
        self.ended.append(request.id)

    def poll_claims(self) -> None:
        """Poll each waiting claim, as coordinators do. A call of another process may have granted it."""
        for coordinator in self.coordinators:
            for request in coordinator.requests:
                self.claim(coordinator, request)

    def check(self) -> None:
        """Check that no worker exceeds its capacity, no request is lost, and nothing is damaged."""
        taken = Counter(request.worker for each in self.coordinators for request in each.requests if request.worker)
        for worker in self.workers:
            assert taken[worker.name] <= worker.capacity, f"{worker.name} has {taken[worker.name]} worker slots taken"
        known = sorted(each.decode() for each in self.redis.zrange("fleet:requests", 0, -1))
        assert known == sorted(self.owned() + self.ended)
        assert not self.redis.hgetall("fleet:repairs")

    def check_all_are_served(self) -> None:
        """Check that free worker slots are granted to waiting claims of both versions."""

        def are_all_served() -> bool:
            self.poll_claims()
            held = [request.worker for each in self.coordinators for request in each.requests]
            taken = Counter(name for name in held if name)
            free = sum(worker.capacity - taken[worker.name] for worker in self.workers)
            return free == 0 or all(held)

        poll(are_all_served, HANG_SECONDS, "every claim is granted, or no worker slot is free")
        self.check()

    def end_all(self) -> None:
        """End every request. A new worker removes queue entries of dead coordinators, and no transient key is left."""
        for coordinator in self.coordinators:
            for request in list(coordinator.requests):
                self.finish(coordinator, request)
        self.add_worker(self.versions[NEW], 1)
        self.check()
        left = [key for kind in TRANSIENT_KEYS for key in self.redis.keys(f"fleet:{kind}:*")]
        assert not left


Step = tuple[str, int, str]
"""Operation, number that selects a candidate, and version of a process that the operation starts."""
KINDS = (
    *("admit", "admit", "admit", "claim", "append", "release", "finish", "finish", "beat", "announce"),
    *("add_worker", "leave", "kill", "resign", "take_over"),
)


def apply(fleet: MixedFleet, step: Step) -> None:
    """Apply a step if it has a candidate."""
    kind, draw, name = step
    version = fleet.versions[name]
    coordinator = fleet.coordinators[draw % len(fleet.coordinators)]
    owned = [(each, request) for each in fleet.coordinators for request in each.requests]
    match kind:
        case "admit" | "beat" | "take_over":
            vars(MixedFleet)[kind](fleet, coordinator)
        case "claim" | "append" | "finish" if owned:
            vars(MixedFleet)[kind](fleet, *owned[draw % len(owned)])
        case "release" if owned:
            fleet.release(*owned[draw % len(owned)], draw % 2 * 30)
        case "add_worker" if len(fleet.workers) < MAX_WORKERS:
            fleet.add_worker(version, 1 + draw % 2)
        case "announce" if fleet.workers:
            fleet.announce(fleet.workers[draw % len(fleet.workers)])
        case "leave" if fleet.workers:
            fleet.leave(fleet.workers[draw % len(fleet.workers)])
        case "kill" | "resign":
            fleet.end_coordinator(coordinator, version, is_killed=kind == "kill")


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Version]:
    tree = unpack_release(tmp_path_factory.mktemp("release") / "tree")
    return {OLD: Version(OLD, script_calls_of(tree), release_call), NEW: Version(NEW, script_calls, script_call)}


@pytest.fixture(scope="module", params=sorted(server_binaries()))
def redis(request: pytest.FixtureRequest) -> Iterator[Any]:
    with (
        running_server(request.param, "--appendonly", "no") as server,
        Redis.from_url(server.url, protocol=2) as client,
    ):
        for source in (release_script(), script_source()):
            client.script_load(source)
        yield client


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(0, 11), st.sampled_from((OLD, NEW))), min_size=5, max_size=40
    )
)
def test_operations_of_both_versions_in_any_order_leave_the_store_consistent(
    redis: Any, versions: Mapping[str, Version], steps: list[Step]
) -> None:
    redis.flushall()
    fleet = MixedFleet(redis, versions)
    fleet.start()
    for step in steps:
        apply(fleet, step)
        fleet.poll_claims()
        fleet.check()
    fleet.check_all_are_served()
    fleet.end_all()


@pytest.mark.parametrize("names", [(OLD, NEW), (NEW, OLD)], ids="-".join)
def test_a_worker_slot_released_by_one_version_goes_to_a_claim_of_the_other_version(
    redis: Any, versions: Mapping[str, Version], names: tuple[str, str]
) -> None:
    redis.flushall()
    fleet = MixedFleet(redis, versions)
    first, second = (versions[name] for name in names)
    fleet.add_coordinator(first)
    fleet.add_coordinator(second)
    fleet.add_worker(second, 1)
    holder, waiter = fleet.coordinators
    fleet.admit(holder)
    fleet.admit(waiter)
    assert (holder.requests[0].worker, waiter.requests[0].worker) == ("w-1", "")
    with redis.pubsub() as channel:
        channel.subscribe(f"fleet:coordinator:{waiter.name}")
        assert channel.get_message(timeout=HANG_SECONDS)["type"] == "subscribe"
        fleet.finish(holder, holder.requests[0])
        message = channel.get_message(timeout=HANG_SECONDS)
    assert message["data"].split(b"\n") == [b"grant", waiter.requests[0].ticket.encode(), b"w-1"]
    fleet.poll_claims()
    assert waiter.requests[0].worker == "w-1"
    fleet.end_all()


@pytest.mark.parametrize("names", [(OLD, NEW), (NEW, OLD)], ids="-".join)
def test_a_write_under_an_epoch_ended_by_the_other_version_is_refused(
    redis: Any, versions: Mapping[str, Version], names: tuple[str, str]
) -> None:
    redis.flushall()
    fleet = MixedFleet(redis, versions)
    first, second = (versions[name] for name in names)
    fleet.add_coordinator(first)
    former = fleet.coordinators[0]
    fleet.admit(former)
    fleet.end_coordinator(former, second, is_killed=True)
    (request,) = fleet.coordinators[0].requests
    assert request.epoch == 2
    assert fleet.run(first, "finish", first.calls.end(request.id))[0] == b"lost"
    late = {"id": request.id, "epoch": 1, "number": 0, "state": "2", "extra": "", "events": ["event"]}
    assert fleet.run(first, "append", late)[0] == b"lost"
    fleet.end_all()
