"""A short chaos run with one seed, and tests that its checks find violations.

Longer runs: python tests/fleet/chaos/run_chaos.py --requests 1000, with --churn for timed kills.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from chaos_checks import Stored, check_files, check_requests, check_store, read_store
from chaos_churn import Churn
from chaos_clients import Outcome, RunProgress
from chaos_links import Link
from chaos_plan import MEDIA_REQUESTS, Behavior, Fault, Kind, Plan, make_churn_plan, make_plan
from chaos_processes import COORDINATOR, Process, Role
from chaos_report import Denoising, Latency
from redis.asyncio import Redis
from run_chaos import explain, run_chaos

from async_tests import wait_until
from common.state.connection import command
from common.state.records import ResultFile, state_event
from common.state.requests import RequestStore
from fleet.v1 import generation_pb2 as pb
from redis_servers import run_on_empty_store, running_server

SEED, REQUESTS, FAULTS = 1, 60, 24
LONGEST_SECONDS = 2.0


def plan(seed: int = SEED, requests: int = REQUESTS) -> Plan:
    return make_plan(seed, requests, clients=6, faults=FAULTS, longest_seconds=LONGEST_SECONDS)


def test_a_short_chaos_run_has_no_findings() -> None:
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))  # paths of Unix sockets must be short
    report = run_chaos(plan(), directory)
    assert not report.findings, explain(report, directory)
    assert {injected.fault.kind for injected in report.injected} == set(Kind)
    assert len(report.injected) == FAULTS
    assert len(report.stored) >= REQUESTS - sum(outcome.gave_up for outcome in report.outcomes)
    assert "SIGKILL of a denoiser and its coordinator" in report.table()
    shutil.rmtree(directory)


def test_a_seed_determines_the_plan() -> None:
    assert plan(7) == plan(7)
    assert plan(7).faults != plan(8).faults
    assert plan(7).orders != plan(8).orders
    assert {fault.kind for fault in plan(7).faults} == set(Kind)
    assert {order.behavior for order in plan(7).orders} == set(Behavior) - {Behavior.POISON}


def churn_plan(poison: int = 2, death_seconds: float = 8.0) -> Plan:
    return make_churn_plan(
        SEED, 20, clients=6, death_seconds=death_seconds, longest_seconds=LONGEST_SECONDS, poison=poison
    )


def test_only_poison_requests_of_a_churn_plan_may_fail() -> None:
    drawn = churn_plan()
    behaviors = Counter(order.behavior for order in drawn.orders)
    assert behaviors.pop(Behavior.POISON) == 2
    assert set(behaviors) == {Behavior.SUBMIT, Behavior.KEYED, Behavior.TWICE, Behavior.GENERATE}
    assert drawn == churn_plan()
    failed, succeeded = state_event(pb.REQUEST_STATE_FAILED), state_event(pb.REQUEST_STATE_SUCCEEDED)
    for order, end, explained in (
        (next(each for each in drawn.orders if each.behavior is Behavior.POISON), failed, True),
        (next(each for each in drawn.orders if each.behavior is Behavior.POISON), succeeded, False),
        (next(each for each in drawn.orders if each.behavior is Behavior.KEYED), failed, False),
    ):
        record = pb.RequestRecord(state=end.state_change.state, caller=order.caller)
        found = check_requests({"c": Stored(record, [end], 1)}, [Outcome(order, request_id="c", received=[end])], ())
        assert bool(found) != explained


class _FakeFleet:
    """A fake fleet without processes; records the faults that are injected into it."""

    def __init__(self, poisoned: str) -> None:
        self.roles = [COORDINATOR, Role("denoising", "flux"), Role("denoising", "flux"), Role("decoding", "flux")]
        unused = cast(Any, None)
        self.living = [
            Process(str(pid), role, unused, unused, unused, unused, None, pid=pid)
            for pid, role in enumerate(self.roles)
        ]
        self.injected: list[tuple[Kind, int]] = []
        self._poisoned = poisoned

    def of(self, *, coordinators: bool) -> list[Process]:
        return [each for each in self.living if (each.role == COORDINATOR) == coordinators]

    async def runs_by_worker(self) -> dict[int, tuple[str, ...]]:
        return {2: (self._poisoned,)}

    async def inject(self, fault: Fault, target: Process) -> None:
        self.injected.append((fault.kind, target.pid))
        target.ended.set()


def test_churn_kills_every_process_repeatedly() -> None:
    async def scenario() -> None:
        drawn, fleet, run_progress = churn_plan(poison=0, death_seconds=0.01), _FakeFleet(""), RunProgress()
        running = asyncio.create_task(Churn(drawn, cast(Any, fleet), cast(Any, fleet), ()).run(run_progress))

        async def all_are_hit() -> bool:
            return min(Counter(pid for _, pid in fleet.injected).get(pid, 0) for pid in range(4)) >= 3

        await wait_until(all_are_hit)
        run_progress.end()
        await running
        assert {kind for kind, pid in fleet.injected if pid == 0} <= {Kind.KILL_COORDINATOR, Kind.STOP_COORDINATOR}
        assert {kind for kind, pid in fleet.injected if pid in (1, 2)} <= {Kind.KILL_DENOISER, Kind.STOP_WORKER}

    asyncio.run(scenario())


def test_a_poison_request_kills_the_worker_that_denoises_it() -> None:
    async def scenario() -> None:
        drawn, fleet, run_progress = churn_plan(poison=1, death_seconds=0.0), _FakeFleet("p"), RunProgress()
        clients = [
            cast(
                Any,
                SimpleNamespace(outcome=Outcome(order, request_id="p" if order.behavior is Behavior.POISON else "")),
            )
            for order in drawn.orders
        ]
        running = asyncio.create_task(Churn(drawn, cast(Any, fleet), cast(Any, fleet), clients).run(run_progress))

        async def is_hit() -> bool:
            return bool(fleet.injected)

        await wait_until(is_hit)
        run_progress.end()
        await running
        assert set(fleet.injected) == {(Kind.KILL_DENOISER, 2)}

    asyncio.run(scenario())


def outcome(name: str, behavior: Behavior = Behavior.KEYED, **more: Any) -> Outcome:
    order = next(order for order in plan().orders if order.behavior is behavior)
    return Outcome(order, request_id=name, **more)


def on_store(scenario: Callable[[Redis, RequestStore], Awaitable[None]]) -> None:
    async def test(redis: Redis) -> None:
        await scenario(redis, RequestStore(redis))

    with running_server("valkey") as server:
        run_on_empty_store(server.url, test)


async def accepted(store: RequestStore, name: str) -> Outcome:
    media_request = MEDIA_REQUESTS[0]
    order = outcome(name).order
    record = pb.RequestRecord(
        request_id=name, model=media_request.model, parameters=media_request.parameters, caller=order.caller
    )
    admission = await store.admit(record)
    return Outcome(order, request_id=name, received=list(admission.events))


def test_a_lost_or_unfinished_request_is_a_finding() -> None:
    async def scenario(redis: Redis, store: RequestStore) -> None:
        good, open_one = await accepted(store, "good"), await accepted(store, "open")
        good.received += await store.finish("good", pb.REQUEST_STATE_SUCCEEDED) or ()
        stored = await read_store(redis)
        assert not check_requests({"good": stored["good"]}, [good], ())
        (finding,) = check_requests(stored, [good, outcome("gone")], ["open"])[1:]
        assert "gone" in finding
        assert "is not in the store" in finding
        assert any("its events have the ends []" in each for each in check_requests(stored, [good, open_one], ()))
        good.received.pop()
        (finding,) = check_requests({"good": stored["good"]}, [good], ())
        assert "received the events" in finding
        stored["good"].record.caller = "somebody"
        (finding,) = check_requests({"good": stored["good"]}, [good], ())
        assert "has the caller somebody, but order" in finding

    on_store(scenario)


def test_a_second_or_unexplained_end_is_a_finding() -> None:
    async def scenario(redis: Redis, store: RequestStore) -> None:
        for name in ("twice", "failed", "stray"):
            await accepted(store, name)
            await store.finish(name, pb.REQUEST_STATE_FAILED, error=pb.Error(message="by chance"))
        stored = await read_store(redis)
        stored["twice"].events.append(state_event(pb.REQUEST_STATE_FAILED))
        found = check_requests({"twice": stored["twice"]}, [], ["twice"])
        assert len(found) == 1
        assert "its events have the ends" in found[0]
        (finding,) = check_requests({"failed": stored["failed"]}, [outcome("failed")], ())
        assert "unexplained: by chance" in finding
        found = check_requests({"stray": stored["stray"]}, [], ())
        assert len(found) == 2  # no client lost a reply, and the request is FAILED
        cancelled, expired = state_event(pb.REQUEST_STATE_CANCELLED), state_event(pb.REQUEST_STATE_EXPIRED)
        hurry = outcome("c", Behavior.HURRY, received=[expired])
        explained = ((outcome("c", Behavior.LEAVE, gave_up=True), cancelled), (hurry, expired))
        unexplained = ((outcome("c"), cancelled), (outcome("c"), expired), (hurry, cancelled))
        for each, end in (*explained, *unexplained):
            record = pb.RequestRecord(state=end.state_change.state, caller=each.order.caller)
            found = check_requests({"c": Stored(record, [end], 1)}, [each], ())
            assert [finding for finding in found if "unexplained" in finding] == found
            assert bool(found) == ((each, end) in unexplained)

    on_store(scenario)


def test_keys_left_in_the_store_are_findings() -> None:
    async def scenario(redis: Redis, store: RequestStore) -> None:
        await accepted(store, "r")
        assert any("still has fleet:open:flux" in finding for finding in await check_store(redis))
        file = ResultFile(pb.FileHeader(count=1, byte_size=1), [b"x"])
        await store.finish("r", pb.REQUEST_STATE_SUCCEEDED, files=[file])
        assert not await check_store(redis)
        await command(redis, "HSET", "fleet:slots:flux/denoising", "ticket", "worker|owner")
        await command(redis, "SET", "fleet:pace:flux/denoising", "1")
        await command(redis, "ZADD", "fleet:shares:flux/denoising|100", "1", "caller")
        await command(redis, "HSET", "fleet:work:flux/denoising", "caller", "1")
        await command(redis, "HSET", "fleet:request:r", "left:denoising", "1")
        assert await check_store(redis) == [
            "the store has fleet:pace:flux/denoising without a TTL",
            "the store still has the field left:denoising of fleet:request:r",
            "the store has fleet:shares:flux/denoising|100 without a TTL",
            "the store still has fleet:slots:flux/denoising",
            "the store still has fleet:work:flux/denoising",
        ]

    on_store(scenario)


def test_different_bytes_are_a_finding() -> None:
    media_request = MEDIA_REQUESTS[0]
    record = pb.RequestRecord(model=media_request.model, parameters=media_request.parameters)
    assert not check_files("r", record, [b"png"], {media_request: [b"png"]})
    assert "other bytes" in check_files("r", record, [b"pnG"], {media_request: [b"png"]})[0]


@pytest.mark.parametrize("iterations", range(5))
def test_a_link_that_closes_while_it_accepts_leaks_no_socket(tmp_path: Path, iterations: int) -> None:
    """The event loop accepts the connection in its first iterations; a leaked socket raises a warning."""

    async def scenario() -> None:
        link = Link(tmp_path / "s")
        await link.start()
        with socket.create_connection(("127.0.0.1", link.port)):
            for _ in range(iterations):
                await asyncio.sleep(0)
            await link.close()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(scenario())
        gc.collect()
    assert not [str(each.message) for each in caught]


def test_a_held_link_delivers_late_and_a_cut_link_never(tmp_path: Path) -> None:
    async def scenario() -> None:
        received: asyncio.Queue[bytes] = asyncio.Queue()

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            received.put_nowait(await reader.read())
            writer.close()

        server = await asyncio.start_unix_server(listen, tmp_path / "s")
        link = Link(tmp_path / "s")
        await link.start()
        link.hold()
        _, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(b"late")
        writer.close()  # the sender gives up
        await asyncio.sleep(0)
        assert received.empty()
        link.heal()
        assert await received.get() == b"late"
        link.cut()
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(b"never")
        with suppress(ConnectionResetError):
            assert not await reader.read()
        link.heal()
        await link.close()
        server.close()
        assert received.empty()

    asyncio.run(scenario())


def test_a_skewed_clock_affects_only_the_wall_clock() -> None:
    script = (
        "import time, datetime; from datetime import datetime as d; true = time.time(); before = time.monotonic()\n"
        "import clock_skew; clock_skew.skew_clock(3600)\n"
        "dates = d.now(), datetime.datetime.now(datetime.UTC)\n"
        "times = time.time(), time.time_ns() / 1e9, *(date.timestamp() for date in dates)\n"
        "assert all(3590 < each - true < 3610 for each in times), times\n"
        "assert time.monotonic() - before < 10\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, check=True)


def progress(service: str, step: int, milliseconds: int = 0) -> pb.Event:
    event = pb.Event(progress=pb.StageProgress(service=service, step=step, total_steps=9))
    event.time.FromMilliseconds(milliseconds)
    return event


def test_the_table_counts_resumed_and_restarted_denoisings() -> None:
    steps = [progress("denoising", step) for step in (0, 0, 1, 2, 3, 0, 0, 3, 4, 0, 1, 2)]
    assert Denoising.of(steps) == Denoising(resumed=1, restarted=1, redone=1 + 4)
    latency = Latency()
    latency.add(1_000, [progress("a", 0, 500), progress("a", 2, 900), progress("a", 0, 1_500), progress("a", 3, 1_700)])
    assert (latency.detect, latency.recover) == ([0.5], [0.7])
