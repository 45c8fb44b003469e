"""The script on a damaged store: keys are missing, of another type, or restored from an older copy.

Each operation ends within a bounded number of commands, and undamaged data still works. The operations are read from
the script; an operation without arguments in OPERATIONS fails a test.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis
from redis.exceptions import ResponseError

from common.state.connection import script_call, script_source
from redis_servers import running_server, server_binaries
from script_calls import (
    CONTRACT,
    LASTS,
    MODEL,
    OPERATIONS,
    PLACE,
    REPLY_LIMIT,
    WIRING,
    admission,
    announcement,
    claim,
    end,
    kept_reply,
    loss,
    take_over,
)

SAFE_PLACE = "safe/denoising"
MAX_COMMANDS = 500  # per operation on the fleet of _build(); about twice the measured maximum
SAFE = re.compile(r"safe|coordinator:c-|model:safe|repairs")  # keys that are never damaged


@dataclass
class Store:
    """A server with two copies of the fleet's keys: a complete copy and an earlier copy."""

    redis: Any  # redis-py annotates replies with the types of both of its clients
    complete: dict[bytes, bytes]
    earlier: dict[bytes, bytes]

    def restore(self) -> None:
        """Restore the complete copy."""
        pipeline = self.redis.pipeline(transaction=False)
        pipeline.flushall()
        for key, dump in self.complete.items():
            pipeline.restore(key, 0, dump)
        pipeline.execute()

    def damage(self, key: bytes, kind: str) -> None:
        """Make one key missing, stale, or of another type."""
        self.redis.delete(key)
        if kind == "stale" and key in self.earlier:
            self.redis.restore(key, 0, self.earlier[key])
        elif kind == "string":
            self.redis.set(key, "x") if not self._has_type(key, "string") else self.redis.rpush(key, "x")
        elif kind == "list":
            self.redis.rpush(key, "x") if not self._has_type(key, "list") else self.redis.set(key, "x")

    def _has_type(self, key: bytes, kind: str) -> bool:
        """Whether the key has this type in an undamaged store."""
        prefixes = {
            "string": ("sequence", "pace:", "older:", "idempotency:", "coordinator:"),
            "list": ("reply:", "reply-parts:"),
        }
        return key.decode().removeprefix("fleet:").startswith(prefixes[kind])

    def run(self, operation: str, arguments: Mapping[str, Any]) -> Any:
        return self.redis.execute_command(*script_call(operation, arguments))

    def commands(self) -> int:
        """Number of commands that the server has run, including those of scripts."""
        return sum(stats["calls"] for stats in self.redis.info("commandstats").values())


def _build(run: Callable[..., Any], redis: Any, copy_early: Callable[[], None]) -> None:
    """Build a fleet that uses each kind of key. Calls `copy_early` after the third admission."""
    for owner in ("c-1", "c-2"):
        run("beat", {"owner": owner, "lasts": LASTS})
    for model in (MODEL, "safe"):
        redis.hset(f"fleet:model:{model}", "contract:denoising", CONTRACT)  # as the last release does
        run("declare", {"model": model, "fingerprint": "print", "lasts": LASTS})
        run("announce", announcement("w1" if model == MODEL else "w1safe", model))
    run("announce", announcement("w2"))
    run("refuse", OPERATIONS["refuse"][0])
    for number, owner in enumerate(("c-1", "c-1", "c-2", "dead", "c-1")):
        caller, key = ("ann", "bob")[number % 2], f"key-r{number}"
        variant = ("image", "")[number % 2]
        sums = {"costs": {"denoising": 5}, "work": {"denoising": f"20|64|{number}"}, "wirings": {"denoising": WIRING}}
        run("admit", admission(f"r{number}", owner, caller, idempotency_key=key, variant=variant, **sums))
        if number == 2:
            copy_early()
        run("claim", claim(f"r{number}/{owner}/0", owner, caller))
    run("admit", admission("safe", "c-1", model="safe", costs={"denoising": 1}))
    for number in range(2):
        run("claim", claim(f"safe/c-1/{number}", caller="safe", place=SAFE_PLACE, cost=1))
    run("release", {"ticket": "r1/c-1/0", "place": PLACE, "used": 30})
    run("append", {"id": "r0", "epoch": 1, "number": 0, "state": "2", "extra": "", "events": ["event"]})
    redis.hset("fleet:checkpoint:r0:1-2", "0", "origin")
    run("step_checkpoint", {"id": "r0", "epoch": 1, "checkpoint_key": "fleet:checkpoint:r0:1-2", "step": 2})
    run("death", loss("r0", "w9"))
    run("avoid", {"owner": "c-2", "worker": "w9"})
    run("leaving", {"worker": "w8", "lasts": LASTS})
    for name in ("a", "b", "n", "x"):
        redis.rpush(f"fleet:reply-parts:{name}", "checksum", "frame")
        if name in ("a", "b"):
            run("keep_reply", kept_reply(name))


@pytest.fixture(scope="module", params=sorted(server_binaries()))
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    with running_server(request.param, "--appendfsync", "no") as server:
        redis: Any = Redis.from_url(server.url, protocol=2, socket_timeout=10)
        redis.script_load(script_source())
        built = Store(redis, {}, {})

        def copy() -> dict[bytes, bytes]:
            return {key: redis.dump(key) for key in sorted(redis.keys("fleet:*"))}

        _build(built.run, redis, lambda: built.earlier.update(copy()))
        built.complete = copy()
        yield built
        redis.close()


def test_each_operation_is_tried_on_a_damaged_store() -> None:
    written = re.findall(r"^function ops\.(\w+)\(", script_source(), re.MULTILINE)
    assert len(written) > 15
    missing = set(written) - OPERATIONS.keys()
    assert not missing, f"give OPERATIONS arguments for {', '.join(sorted(missing))}"
    assert not OPERATIONS.keys() - set(written)


def _run_and_check(store: Store, operation: str, arguments: Mapping[str, Any], foreign: set[str]) -> None:
    """Run an operation, and check that it soon ends with a reply or an error that names a damaged key."""
    before, refusal = store.commands(), None
    try:
        store.run(operation, arguments)
    except ResponseError as error:
        refusal = str(error)
    if refusal is not None:
        named = re.fullmatch(r"FLEETKEY (\S+) is a \w+, not the hash of a request; delete that key", refusal)
        assert named, f"{operation}: {refusal}"
        assert named[1] in foreign, f"{operation}: {refusal}"
    assert store.commands() - before <= MAX_COMMANDS, operation


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_operations_end_and_undamaged_data_works_for_any_damage(store: Store, data: st.DataObject) -> None:
    store.restore()
    keys = [key for key in store.complete if not SAFE.search(key.decode())]
    kinds = st.sampled_from(("missing", "stale", "string", "list"))
    damage = data.draw(st.dictionaries(st.sampled_from(keys), kinds, min_size=1, max_size=len(keys)))
    for key, kind in damage.items():
        store.damage(key, kind)
    foreign = {key.decode() for key, kind in damage.items() if kind in ("string", "list")}
    calls = [(operation, each) for operation, some in OPERATIONS.items() for each in some]
    for operation, arguments in data.draw(st.permutations(calls)):
        _run_and_check(store, operation, arguments, foreign)
    _check_undamaged_data(store)


def _check_undamaged_data(store: Store) -> None:
    """Check that undamaged data works, and that damaged keys are usable again."""
    slots = f"fleet:slots:{SAFE_PLACE}"
    assert store.redis.hkeys(slots) == [b"safe/c-1/0"]
    store.run("release", {"ticket": "safe/c-1/0", "place": SAFE_PLACE, "used": 10})
    assert store.redis.hkeys(slots) == [b"safe/c-1/1"]
    event = {"id": "safe", "epoch": 1, "number": 0, "state": "2", "extra": "", "events": ["event"]}
    assert store.run("append", event)[0] == b"appended"
    assert store.run("finish", end("safe"))[0] == b"finished"
    assert store.redis.xlen("fleet:events:safe") == 3
    assert store.run("admit", admission("later", "c-1", "ann", costs={"denoising": 5}))[0] == b"admitted"
    newest = store.redis.zrevrange("fleet:requests", 0, 0)
    assert newest == [b"later"]
    store.run("announce", announcement("w-large", capacity=99))
    assert store.run("claim", claim("later/c-1/0")) == [b"granted", b"info"]
    assert store.redis.zcard(f"fleet:queue:{PLACE}") == store.redis.hlen(f"fleet:waiting:{PLACE}") == 0
    store.redis.rpush("fleet:reply-parts:z", "checksum", "frame")
    store.run("keep_reply", kept_reply("z", REPLY_LIMIT))
    assert store.redis.lrange("fleet:reply:z", 0, -1) == [b"checksum", b"frame"]
    assert store.redis.hgetall("fleet:reply-sizes") == {b"z": str(REPLY_LIMIT).encode()}


def test_entries_of_a_queue_without_a_ticket_are_dropped_and_counted(store: Store) -> None:
    store.restore()
    orphans = {f"095|caller{n}|{n:029}|1|gone/c-1/{n}|c-1": 0 for n in range(1_500)}
    store.redis.zadd(f"fleet:queue:{PLACE}", {**orphans, "no claim at all": 0})
    store.run("announce", announcement("w-large", capacity=9))
    assert 450 < store.redis.zcard(f"fleet:queue:{PLACE}") < 550  # one operation drops about a thousand entries
    assert store.run("claim", claim("new/c-1/0", cost=1)) == [b"granted", b"info"]
    assert store.redis.zcard(f"fleet:queue:{PLACE}") == 0
    assert store.redis.hget("fleet:repairs", "queue") == b"1501"
    assert not [ticket for ticket in store.redis.hkeys(f"fleet:slots:{PLACE}") if ticket.startswith(b"gone")]


def test_a_ticket_without_a_queue_entry_gets_a_new_entry(store: Store) -> None:
    store.restore()
    store.redis.delete(f"fleet:queue:{PLACE}")
    assert store.run("claim", claim("r4/c-1/0"))[0] == b"waiting"
    store.run("announce", announcement("w-large", capacity=9))
    assert b"r4/c-1/0" in store.redis.hkeys(f"fleet:slots:{PLACE}")
    assert store.redis.hget("fleet:repairs", "waiting") == b"1"


def test_a_ticket_with_two_queue_entries_gets_one_worker_slot(store: Store) -> None:
    store.restore()
    store.redis.delete(f"fleet:waiting:{PLACE}")
    store.run("claim", claim("r4/c-1/0"))
    store.run("announce", announcement("w-large", capacity=9))
    assert store.redis.zcard(f"fleet:queue:{PLACE}") == 0
    assert store.redis.hlen(f"fleet:slots:{PLACE}") == 3  # two worker slots were held before


def test_open_requests_without_a_record_are_removed(store: Store) -> None:
    store.restore()
    store.redis.delete("fleet:request:r3")
    store.redis.set("fleet:request:r1", "another type")
    taken, _ = store.run("take_over", take_over("c-1", 1, "r0"))
    assert [row[0] for row in taken] == [b"r4"]
    assert store.redis.smembers(f"fleet:open:{MODEL}") == {b"r0", b"r2", b"r4"}
    assert store.redis.hget("fleet:repairs", "open") == b"2"


def test_sequence_numbers_continue_after_the_loss_of_their_counter(store: Store) -> None:
    store.restore()
    newest = store.redis.zrevrange("fleet:requests", 0, 0, withscores=True)[0][1]
    store.redis.delete("fleet:sequence")
    for name in ("s1", "s2"):
        store.run("admit", admission(name, "c-1"))
    assert store.redis.zrevrange("fleet:requests", 0, 1, withscores=True) == [(b"s2", newest + 2), (b"s1", newest + 1)]


def test_a_failure_is_one_line_without_a_traceback(store: Store) -> None:
    store.restore()
    store.redis.hset(f"fleet:work:{MODEL}/denoising", "ann", "many")
    with pytest.raises(ResponseError) as caught:
        store.run("admit", admission("new", "c-1", "ann", costs={"denoising": 5}))
    assert str(caught.value).startswith("FLEETSTORE admit cannot process the stored data: ERR hash value is not an")
    with pytest.raises(ResponseError, match=r"^FLEETCALL no_such is not an operation$"):
        store.run("no_such", {})
