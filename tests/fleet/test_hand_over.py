"""A draining worker hands its running request over. No step is lost or repeated; no loss is counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from async_tests import wait_until
from common.artifacts import StepCheckpoint
from common.errors import HandedOver
from common.rpc import hand_over
from common.stage import Call
from common.state.connection import command, connect
from common.state.leases import Leases
from coordinator_fleet import (
    FakeFleet,
    FakeWorker,
    Gate,
    Script,
    Stub,
    latents_of,
    run_on_fleet,
    submission,
    terminal,
)
from fleet.v1 import generation_pb2 as pb

OTHER_SERVICES = ("text_encoding", "latent_preparation", "decoding")
STEPS = 8
HELD_AT = 3
EQUAL = "abc123"
"""Numerics fingerprint of workers that compute equal values."""
GRACE_SECONDS = 30.0


@dataclass
class Journal:
    """All computed steps as (request, worker, step), and the latents of each result."""

    steps: list[tuple[str, str, int]] = field(default_factory=list)
    results: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Duration of each run of a loop in seconds, including handed-over runs."""

    def of(self, request: str) -> list[tuple[str, int]]:
        """Worker and step of each computed step of a request."""
        return [(worker, step) for name, worker, step in self.steps if name == request]


@dataclass
class Loop(Script):
    """A denoising loop that calls `before_step(step, call)` before each step."""

    name: str = ""
    journal: Journal = field(default_factory=Journal)
    steps: int = STEPS
    before_step: Callable[[int, Call], None] = lambda _, call: call.check_cancelled()

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            return self._run(values, call)
        finally:
            self.journal.seconds.append(time.perf_counter() - began)

    def _run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        state = values.get("resume_from")
        first = state.step if state is not None else 0
        latents = state.latents.parts["image"].latents if state is not None else torch.zeros(1, 4)
        for step in range(first, self.steps):
            if call.must_hand_over():
                if step > first:
                    call.checkpoint(StepCheckpoint(step=step, latents=latents_of(latents)))
                raise HandedOver(f"handed over after {step} steps")
            self.before_step(step, call)
            latents = latents * 1.5 + step
            self.journal.steps.append((call.request_id, self.name, step))
            call.progress(step + 1, self.steps)
        self.journal.results.append(latents)
        return {"denoised_latents": latents_of(latents)}


def expected(steps: int = STEPS) -> torch.Tensor:
    """The latents of an uninterrupted loop."""
    latents = torch.zeros(1, 4)
    for step in range(steps):
        latents = latents * 1.5 + step
    return latents


def held_at(step: int, gate: Gate) -> Callable[[int, Call], None]:
    """A `before_step` that waits at the gate before one step."""

    def before_step(each: int, call: Call) -> None:
        if each == step:
            gate(call)

    return before_step


def metric(name: str, **labels: str) -> float:
    series = {"service": "denoising", "model": "emoji", **labels}
    return REGISTRY.get_sample_value(name, series) or 0.0


def lost_calls() -> float:
    return metric("fleet_lost_calls_total", begun="yes") + metric("fleet_lost_calls_total", begun="no")


def handed_over() -> tuple[float, float]:
    """Number of handed-over calls, and number of attempts that continued such a call."""
    return metric("fleet_handed_over_calls_total"), metric("fleet_retried_calls_total", reason="handed_over")


async def add_loop(fleet: FakeFleet, name: str, journal: Journal, *, numerics: str = EQUAL, **more: Any) -> FakeWorker:
    loop = Loop(fleet.scripts["denoising"].contract, name=name, journal=journal, **more)
    return await fleet.add_worker("denoising", loop, numerics=numerics)


async def submitted(stub: Stub) -> str:
    return (await stub.Submit(submission())).request.request_id


@pytest.fixture(autouse=True)
def no_lost_call(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Assert that no lost call is recorded."""
    deaths: list[object] = []
    add_death = Leases.add_death

    async def record(leases: Leases, *arguments: Any, **options: Any) -> Any:
        deaths.append(arguments)
        return await add_death(leases, *arguments, **options)

    monkeypatch.setattr(Leases, "add_death", record)
    yield
    assert not deaths


async def check_success(stub: Stub, redis: Redis, name: str) -> None:
    """Check that the request succeeds and that no worker is avoided."""
    assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
    assert not await redis.keys("fleet:avoided:*")


async def wait_asked(worker: FakeWorker) -> None:
    """Wait until the worker has asked a call to hand over."""

    async def is_asked() -> bool:
        return any(call.is_asked for call in worker.servicer.running())

    await wait_until(is_asked)


def polls_of(worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of free worker slots at each poll of a draining worker. The list grows with each poll."""
    found: list[int] = []
    free_slots = worker.registry.free_slots

    async def counted(*arguments: Any) -> int:
        found.append(await free_slots(*arguments))
        return found[-1]

    monkeypatch.setattr(worker.registry, "free_slots", counted)
    return found


@pytest.mark.parametrize("starts_later", [False, True], ids=["free", "starts later"])
def test_request_continues_at_the_next_step_on_an_equal_worker(
    store_url: str, monkeypatch: pytest.MonkeyPatch, *, starts_later: bool
) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        journal, gate = Journal(), Gate()
        await fleet.add_workers(OTHER_SERVICES)
        leaving = await add_loop(fleet, "a", journal, before_step=held_at(HELD_AT, gate))
        _, stub = await fleet.add_coordinator()
        before = lost_calls(), handed_over()
        name = await submitted(stub)
        await gate.wait_reached()
        polls = polls_of(leaving, monkeypatch)
        if not starts_later:
            await add_loop(fleet, "b", journal)
        ends = asyncio.create_task(leaving.leave(GRACE_SECONDS))
        if starts_later:

            async def has_polled() -> bool:
                return polls[:1] == [0]

            await wait_until(has_polled)
            await add_loop(fleet, "b", journal)
        await wait_asked(leaving)
        gate.opened.set()
        async with connect(fleet.url) as redis:
            await check_success(stub, redis, name)
        await ends
        assert journal.of(name) == [("a" if step <= HELD_AT else "b", step) for step in range(STEPS)]
        assert torch.equal(journal.results[0], expected())
        assert (lost_calls(), handed_over()) == (before[0], tuple(each + 1 for each in before[1]))

    run_on_fleet(store_url, scenario)


@pytest.mark.parametrize("other", ["", "fff999"], ids=["no other worker", "other fingerprint"])
def test_request_finishes_on_its_worker_if_no_other_worker_is_equal(
    store_url: str, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        journal, gate = Journal(), Gate()
        await fleet.add_workers(OTHER_SERVICES)
        leaving = await add_loop(fleet, "a", journal, before_step=held_at(HELD_AT, gate))
        _, stub = await fleet.add_coordinator()
        name = await submitted(stub)
        await gate.wait_reached()
        if other:
            await add_loop(fleet, "b", journal, numerics=other)
        polls = polls_of(leaving, monkeypatch)
        ends = asyncio.create_task(leaving.leave(GRACE_SECONDS))

        async def has_polled() -> bool:
            return len(polls) > 1

        await wait_until(has_polled)
        gate.opened.set()
        async with connect(fleet.url) as redis:
            await check_success(stub, redis, name)
        await ends
        assert not any(polls)
        assert journal.of(name) == [("a", step) for step in range(STEPS)]

    run_on_fleet(store_url, scenario)


def test_handed_over_request_precedes_waiting_requests(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request already waits. The equal worker starts after the first worker has ended."""
    steps, grace = 150, 60.0
    # The call is asked to hand over after less than 3 s; more than 50 s remain until it would be cancelled.
    monkeypatch.setattr(hand_over, "_MARGIN_SECONDS", 57.0)
    monkeypatch.setattr(hand_over, "_MARGIN_OF_GRACE", 1.0)

    async def scenario(fleet: FakeFleet) -> None:
        journal, started = Journal(), Gate()

        def slow(_: int, call: Call) -> None:
            started.reached.set()
            time.sleep(0.2)
            call.check_cancelled()

        await fleet.add_workers(OTHER_SERVICES)
        leaving = await add_loop(fleet, "a", journal, steps=steps, before_step=slow)
        _, stub = await fleet.add_coordinator()
        before = lost_calls()
        name = await submitted(stub)
        await started.wait_reached()
        waiting = await submitted(stub)
        async with connect(fleet.url) as redis:

            async def waits() -> bool:
                return await redis.zcard("fleet:queue:emoji/denoising") == 1

            await wait_until(waits)
            began = time.monotonic()
            await leaving.leave(grace)
            assert time.monotonic() - began < grace

            async def both_wait() -> bool:
                return await redis.zcard("fleet:queue:emoji/denoising") == 2

            await wait_until(both_wait)
            done = len(journal.of(name))
            assert 0 < done < steps
            await add_loop(fleet, "b", journal, steps=steps)
            await check_success(stub, redis, name)
            await check_success(stub, redis, waiting)
        assert journal.of(name) == [("a" if step < done else "b", step) for step in range(steps)]
        assert [each[0] for each in journal.steps].index(waiting) == steps, "the waiting request ran first"
        assert all(torch.equal(each, expected(steps)) for each in journal.results)
        assert lost_calls() == before

    run_on_fleet(store_url, scenario)


def test_request_that_waits_at_a_draining_worker_moves_immediately(store_url: str) -> None:
    """The waiting request has computed no step. The running request is held at a gate meanwhile, and loses no step."""

    async def scenario(fleet: FakeFleet) -> None:
        journal, gate = Journal(), Gate()
        await fleet.add_workers(OTHER_SERVICES)
        loop = Loop(fleet.scripts["denoising"].contract, name="a", journal=journal, before_step=held_at(HELD_AT, gate))
        leaving = await fleet.add_worker("denoising", loop, capacity=2, numerics=EQUAL)
        _, stub = await fleet.add_coordinator()
        before = lost_calls()
        first, second = await submitted(stub), await submitted(stub)
        await gate.wait_reached()

        async def has_both() -> bool:
            return len(leaving.servicer.running()) == 2

        await wait_until(has_both)
        (running,) = [call.request_id for call in leaving.servicer.running() if call.has_begun]
        (waiting,) = {first, second} - {running}
        await add_loop(fleet, "b", journal)
        ends = asyncio.create_task(leaving.leave(GRACE_SECONDS))
        async with connect(fleet.url) as redis:
            await check_success(stub, redis, waiting)
            gate.opened.set()
            await check_success(stub, redis, running)
        await ends
        assert {worker for worker, _ in journal.of(waiting)} == {"b"}
        assert [step for _, step in journal.of(running)] == list(range(STEPS))
        assert lost_calls() == before

    run_on_fleet(store_url, scenario)


def test_pace_includes_both_attempts_of_a_handed_over_request(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        journal, gate = Journal(), Gate()
        await fleet.add_workers(OTHER_SERVICES)
        leaving = await add_loop(fleet, "a", journal, before_step=held_at(HELD_AT, gate))
        _, stub = await fleet.add_coordinator()
        request = submission()
        request.parameters.num_inference_steps = STEPS
        name = (await stub.Submit(request)).request.request_id
        await gate.wait_reached()
        await asyncio.sleep(0.2)
        await add_loop(fleet, "b", journal, before_step=lambda *_: time.sleep(0.01))
        ends = asyncio.create_task(leaving.leave(GRACE_SECONDS))
        await wait_asked(leaving)
        gate.opened.set()
        async with connect(fleet.url) as redis:
            await check_success(stub, redis, name)
            await ends

            async def is_released() -> bool:
                return not await command(redis, "HLEN", "fleet:slots:emoji/denoising")

            await wait_until(is_released)
            (pace,) = await command(redis, "HVALS", "fleet:paces:emoji/denoising")
        seconds, steps, *_ = map(float, pace.split())
        first, second = journal.seconds
        # The store scales earlier attempts by 0.8 when it adds an attempt to the pace.
        assert steps == pytest.approx((STEPS - HELD_AT - 1) + 0.8 * (HELD_AT + 1))
        computed = second + 0.8 * first
        assert computed <= seconds + 1e-5
        assert seconds == pytest.approx(computed, abs=0.5), "the pace includes more than steps and transfers"

    run_on_fleet(store_url, scenario)


def test_two_draining_workers_and_one_free_worker_slot_lose_no_step(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        journal, gates = Journal(), (Gate(), Gate())
        await fleet.add_workers(OTHER_SERVICES)
        leaving = [
            await add_loop(fleet, name, journal, before_step=held_at(HELD_AT, gate))
            for name, gate in zip("ab", gates, strict=True)
        ]
        _, stub = await fleet.add_coordinator()
        before = lost_calls()
        names = [await submitted(stub), await submitted(stub)]
        for gate in gates:
            await gate.wait_reached()
        await add_loop(fleet, "c", journal)
        ends = [asyncio.create_task(each.leave(GRACE_SECONDS)) for each in leaving]
        for each in leaving:
            await wait_asked(each)
        for gate in gates:
            gate.opened.set()
        async with connect(fleet.url) as redis:
            for name in names:
                await check_success(stub, redis, name)
        await asyncio.gather(*ends)
        for name in names:
            assert [step for _, step in journal.of(name)] == list(range(STEPS))
            assert journal.of(name)[HELD_AT + 1][0] == "c"
        assert lost_calls() == before

    run_on_fleet(store_url, scenario)
