"""A coordinator counts what happens to requests: waiting, losses, retries, step checkpoints, resumes and take-overs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import torch
from prometheus_client import REGISTRY

from async_tests import wait_until
from common.artifacts import StepCheckpoint
from common.stage import Call
from common.state.connection import command, connect
from coordinator_fleet import FakeFleet, Gate, Script, latents_of, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb

_NUMERICS = "equal"
_MODEL = {"model": "emoji"}
_DENOISING = {"service": "denoising", **_MODEL}


def _value(name: str, labels: Mapping[str, str]) -> float:
    return REGISTRY.get_sample_value(name, dict(labels)) or 0.0


class _Counted:
    """How much metrics have grown since they were first asked for."""

    def __init__(self, *series: tuple[str, Mapping[str, str]]) -> None:
        self._before = {(name, frozenset(labels.items())): _value(name, labels) for name, labels in series}

    def grown(self) -> list[float]:
        """By how much each has grown, in the order in which they were named."""
        return [_value(name, dict(labels)) - before for (name, labels), before in self._before.items()]


class _Denoiser:
    """Sends a checkpoint after the first of two steps. The first call waits then for a gate; `tokens` are of calls."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.tokens: list[int] = []

    def __call__(self, call: Call) -> None:
        self.tokens.append(call.tokens)
        call.progress(1, 2)
        call.checkpoint(StepCheckpoint(step=1, latents=latents_of(torch.zeros(1, 4))))
        if not self.gate.reached.is_set():
            self.gate(call)


def test_a_request_that_loses_its_worker_is_counted(store_url: str) -> None:
    counted = _Counted(
        ("fleet_requests_total", {**_MODEL, "state": "SUCCEEDED"}),
        ("fleet_request_duration_seconds_count", {**_MODEL, "state": "SUCCEEDED"}),
        ("fleet_queue_wait_seconds_count", _DENOISING),
        ("fleet_service_duration_seconds_count", _DENOISING),
        ("fleet_lost_calls_total", {**_DENOISING, "begun": "yes"}),
        ("fleet_retried_calls_total", {**_DENOISING, "reason": "lost"}),
        ("fleet_suspected_workers_total", _DENOISING),
        ("fleet_resumed_calls_total", _DENOISING),
        ("fleet_step_checkpoints_total", _DENOISING),
        ("grpc_client_attempt_started_total", {"grpc_method": "fleet.v1.DenoisingService/Denoise"}),
    )
    stored = _Counted(("fleet_step_checkpoint_saves_total", {"result": "stored"}))
    payload = _Counted(("fleet_step_checkpoint_bytes_total", _DENOISING))

    async def story(fleet: FakeFleet) -> None:
        denoiser = _Denoiser()
        script = Script(fleet.scripts["denoising"].contract, denoiser)
        await fleet.add_workers(("text_encoding", "latent_preparation", "decoding"))
        worker = await fleet.add_worker("denoising", script, numerics=_NUMERICS, ttl_seconds=1.0)
        _, stub = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        await denoiser.gate.wait_reached()

        async def is_stored() -> bool:
            return stored.grown() == [1]

        await wait_until(is_stored)
        await worker.die()
        await fleet.add_worker("denoising", script, numerics=_NUMERICS)
        assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        assert counted.grown() == [1, 1, 2, 1, 1, 1, 1, 1, 2, 2]
        assert payload.grown()[0] > 2 * 16, "two checkpoints of four float32 numbers, and their messages"
        assert len(denoiser.tokens) == 2
        assert set(denoiser.tokens) == {denoiser.tokens[0]} != {0}, "pixels of the request, for the worker's metrics"

        async def is_dead() -> bool:
            return (_value("fleet_workers_dead", _DENOISING), _value("fleet_workers_live", _DENOISING)) == (1, 1)

        await wait_until(is_dead)

    run_on_fleet(store_url, story)


def test_a_worker_that_is_full_is_asked_again(store_url: str) -> None:
    counted = _Counted(("fleet_retried_calls_total", {**_DENOISING, "reason": "full"}))

    async def story(fleet: FakeFleet) -> None:
        gate = Gate()
        script = Script(fleet.scripts["denoising"].contract, gate)
        await fleet.add_workers(("text_encoding", "latent_preparation", "decoding"))
        await fleet.add_worker("denoising", script, announced=2)
        _, stub = await fleet.add_coordinator()
        names = [(await stub.Submit(submission())).request.request_id for _ in range(2)]

        async def is_full() -> bool:
            return counted.grown()[0] >= 1

        await wait_until(is_full)
        gate.opened.set()
        for name in names:
            assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

    run_on_fleet(store_url, story)


def test_the_gauges_of_a_service_follow_the_store(store_url: str) -> None:
    async def story(fleet: FakeFleet) -> None:
        gate = Gate()
        await fleet.add_workers(("text_encoding", "latent_preparation", "decoding"))
        await fleet.add_worker("denoising", Script(fleet.scripts["denoising"].contract, gate))
        coordinator, stub = await fleet.add_coordinator()
        names = [(await stub.Submit(submission())).request.request_id for _ in range(3)]

        async def is_seen() -> bool:
            gauges = ("fleet_queue_length", "fleet_open_requests", "fleet_workers_held", "fleet_workers_live")
            return [_value(name, _DENOISING) for name in gauges] == [2, 3, 1, 1]

        await wait_until(is_seen)
        assert _value("fleet_queued_seconds", _DENOISING) > 0
        assert _value("fleet_artifact_bytes", {}) == coordinator.artifact_memory.used_bytes > 0
        gate.opened.set()
        for name in names:
            await terminal(stub, name)

    run_on_fleet(store_url, story)


def test_a_request_that_is_taken_over_is_counted(store_url: str) -> None:
    counted = _Counted(("fleet_taken_over_requests_total", _MODEL))

    async def story(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["decoding"].work = gate
        await fleet.add_workers()
        first, stub = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        _, other = await fleet.add_coordinator()
        leaving = asyncio.create_task(first.stop(0))
        gate.opened.set()
        assert (await terminal(other, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        await leaving
        assert counted.grown() == [1]

    run_on_fleet(store_url, story)


def test_series_are_there_before_the_first_event(store_url: str) -> None:
    async def story(fleet: FakeFleet) -> None:
        await fleet.add_coordinator()
        async with connect(fleet.url) as redis:
            await command(redis, "HSET", "fleet:repairs", "made-up", "3", "queue", "2")

        async def is_read() -> bool:
            return _value("fleet_store_repairs", {"kind": "queue"}) == 2

        await wait_until(is_read)
        for state in ("SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED"):
            assert REGISTRY.get_sample_value("fleet_requests_total", {**_MODEL, "state": state}) is not None
        for reason in ("lost", "handed_over", "full"):
            labels = {**_DENOISING, "reason": reason}
            assert REGISTRY.get_sample_value("fleet_retried_calls_total", labels) is not None
        assert REGISTRY.get_sample_value("fleet_store_repairs", {"kind": "slot"}) is not None
        assert REGISTRY.get_sample_value("fleet_store_repairs", {"kind": "made-up"}) is None

    run_on_fleet(store_url, story)
