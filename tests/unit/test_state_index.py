"""The worker index of a service agrees with workers and worker slots. Claims have a constant cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from common.state.connection import script_call, script_source
from redis_servers import running_server, server_binaries
from script_calls import LASTS, PLACE, announcement, claim

TAKEN_UNIT, FULL = 2**32, 2**52
OWNERS = ("c-1", "c-2")
WORKERS = ("w1", "w2", "w3")


class Store:
    """A server with the script."""

    def __init__(self, url: str) -> None:
        self.redis: Any = Redis.from_url(url, protocol=2, socket_timeout=10)
        self.redis.script_load(script_source())

    def run(self, operation: str, arguments: Mapping[str, Any]) -> Any:
        return self.redis.execute_command(*script_call(operation, arguments))

    def claim_from_lasting_index(self, ticket: str) -> tuple[bytes, int]:
        """Claim a worker slot and remove the expiry of the index, in one transaction.

        Returns the status of the claim, and the ms until the index would have expired; -1 if it has no expiry.
        """
        pipeline = self.redis.pipeline(transaction=True)
        pipeline.execute_command(*script_call("claim", claim(ticket)))
        pipeline.pttl(f"fleet:indexed:{PLACE}").persist(f"fleet:indexed:{PLACE}")
        reply, milliseconds, _ = pipeline.execute()
        return reply[0], milliseconds

    def release(self, ticket: str) -> None:
        """Release a worker slot."""
        self.run("release", {"ticket": ticket, "place": PLACE, "used": 0})

    def beat(self, *owners: str) -> None:
        """Send heartbeats of coordinators."""
        for owner in owners:
            self.run("beat", {"owner": owner, "lasts": LASTS})

    def commands(self) -> int:
        """Number of commands that the server has run, including those of scripts."""
        return sum(stats["calls"] for stats in self.redis.info("commandstats").values())

    def slots(self) -> dict[str, tuple[str, str]]:
        """Worker and owner of each worker slot, by ticket."""
        values = {key.decode(): value.decode().split("|") for key, value in self._hash("slots").items()}
        return {ticket: (worker, owner) for ticket, (worker, owner, *_) in values.items()}

    def workers(self) -> dict[str, tuple[int, int]]:
        """Capacity and number of granted claims of each live worker."""
        live = [each.decode() for each in self.redis.zrange(f"fleet:workers:{PLACE}", 0, -1)]
        fields = {each: self.redis.hmget(f"fleet:worker:{each}", "capacity", "granted") for each in live}
        return {each: (int(capacity), int(granted)) for each, (capacity, granted) in fields.items()}

    def taken(self) -> Counter[str]:
        """Number of taken slots of each worker; a claim for a whole worker takes all of its slots."""
        found: Counter[str] = Counter()
        workers = self.workers()
        for ticket, (worker, _) in self.slots().items():
            if worker in workers:
                found[worker] += workers[worker][0] if ticket.endswith("/alone") else 1
        return found

    def indexed(self) -> dict[str, str]:
        """The marker of the index; empty if the index is not valid."""
        return {key.decode(): value.decode() for key, value in self._hash("indexed").items()}

    def load(self) -> dict[str, float]:
        """The score of each worker in the index."""
        return {key.decode(): score for key, score in self.redis.zrange(f"fleet:load:{PLACE}", 0, -1, withscores=True)}

    def _hash(self, name: str) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = self.redis.hgetall(f"fleet:{name}:{PLACE}")
        return found


@pytest.fixture(scope="module", params=sorted(server_binaries()))
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    with running_server(request.param, "--appendfsync", "no") as server:
        built = Store(server.url)
        yield built
        built.redis.close()


def check_index(store: Store) -> None:
    """Check that the index, if it is valid, agrees with workers and worker slots."""
    marker = store.indexed()
    if not marker:
        return
    workers, taken = store.workers(), store.taken()
    assert store.load() == {
        each: (FULL if taken[each] >= capacity else 0) + taken[each] * TAKEN_UNIT + granted
        for each, (capacity, granted) in workers.items()
    }
    assert int(marker["capacity"]) == sum(capacity for capacity, _ in workers.values())
    assert {owner for _, owner in store.slots().values()} <= set(marker["owners"].split("\n"))


def check_choice(store: Store, ticket: str, before: Mapping[str, tuple[int, int]], taken: Counter[str]) -> None:
    """Check that the claim got a worker with the fewest taken slots and, among these, the fewest grants."""
    free = {each: (taken[each], granted) for each, (capacity, granted) in before.items() if taken[each] < capacity}
    chosen = store.slots()[ticket][0]
    assert free[chosen] == min(free.values())


STEPS = st.one_of(
    st.tuples(st.just("announce"), st.sampled_from(WORKERS), st.integers(1, 3)),
    st.tuples(st.just("leaving"), st.sampled_from(WORKERS), st.just(0)),
    st.tuples(st.just("claim"), st.sampled_from(OWNERS), st.sampled_from(("", "", "", "/equal:numerics", "/alone"))),
    st.tuples(st.just("release"), st.just(""), st.integers(0, 30)),
    st.tuples(st.just("resign"), st.sampled_from(OWNERS), st.just(0)),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=5, max_size=40))
def test_the_index_agrees_with_workers_and_worker_slots(store: Store, steps: list[tuple[str, str, Any]]) -> None:
    store.redis.flushdb()
    store.beat(*OWNERS)
    tickets: list[str] = []
    for number, (kind, name, value) in enumerate(steps):
        if kind == "announce":
            store.redis.delete(f"fleet:leaving:{name}")
            store.run("announce", announcement(name, capacity=value))
        elif kind == "leaving":
            store.run("leaving", {"worker": name, "lasts": LASTS})
        elif kind == "claim":
            store.beat(name)
            tickets.append(f"r{number}/{name}/0{value}")
            before, taken, num_waiting = store.workers(), store.taken(), store.redis.zcard(f"fleet:queue:{PLACE}")
            dead = {owner for _, owner in store.slots().values()} - {each for each in OWNERS if _lives(store, each)}
            reply = store.run("claim", claim(tickets[-1], name))
            if reply[0] == b"granted" and not (num_waiting or value or dead):
                check_choice(store, tickets[-1], before, taken)
            if reply[0] == b"waiting" and not (num_waiting or value or dead):
                assert all(taken[each] >= capacity for each, (capacity, _) in before.items())
        elif kind == "release" and tickets:
            store.release(tickets.pop(value % len(tickets)))
        elif kind == "resign":
            store.run("resign", {"owner": name})
        check_index(store)


def _lives(store: Store, owner: str) -> bool:
    return bool(store.redis.exists(f"fleet:coordinator:{owner}"))


def commands_of_ten_claims(store: Store, workers: int) -> int:
    """Number of commands of ten claims, releases and heartbeats while half of the workers are busy."""
    store.redis.flushdb()
    store.beat("c-1")
    for number in range(workers):
        store.run("announce", announcement(f"w{number}"))
    for number in range(workers // 2):
        store.claim_from_lasting_index(f"held{number}/c-1/0")
    before = store.commands()
    for number in range(10):
        assert store.run("claim", claim(f"r{number}/c-1/0"))[0] == b"granted"
        store.release(f"r{number}/c-1/0")
        store.run("announce", announcement(f"w{number}"))
        assert store.indexed()  # the index stays valid after a heartbeat
    return store.commands() - before


def test_the_cost_of_claims_and_heartbeats_is_independent_of_the_number_of_workers(store: Store) -> None:
    assert commands_of_ten_claims(store, 400) <= commands_of_ten_claims(store, 20) + 10


def test_worker_slots_of_a_coordinator_that_ends_are_free_at_once(store: Store) -> None:
    store.redis.flushdb()
    store.beat(*OWNERS)
    store.run("announce", announcement("w1"))
    assert store.run("claim", claim("r1/c-2/0", "c-2"))[0] == b"granted"
    store.run("resign", {"owner": "c-2"})
    assert store.run("claim", claim("r2/c-1/0"))[0] == b"granted"


def test_a_wrong_index_expires(store: Store) -> None:
    store.redis.flushdb()
    store.beat("c-1")
    store.run("announce", announcement("w1"))
    status, milliseconds = store.claim_from_lasting_index("r1/c-1/0")
    assert status == b"granted"
    assert 0 < milliseconds <= 1_000
    store.redis.delete(f"fleet:slots:{PLACE}")  # as in an older copy of the store
    assert store.run("claim", claim("r2/c-1/0"))[0] == b"waiting"
    store.redis.delete(f"fleet:indexed:{PLACE}", f"fleet:rechecked:{PLACE}")  # as if both keys had expired
    assert store.run("claim", claim("r2/c-1/0"))[0] == b"granted"
