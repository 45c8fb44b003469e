"""Metrics of a coordinator: waiting, losses, retries, step checkpoints, resumes and take-overs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
import torch
from prometheus_client import REGISTRY

from async_tests import run_bounded, wait_until
from common.artifacts import StepCheckpoint
from common.errors import FleetError, InternalError, NotFound, Unavailable
from common.rpc.client import open_channel
from common.stage import Call
from common.state.connection import StoreFull, command, connect
from common.state.records import Cancellation
from common.state.requests import RequestStore
from coordinator_fleet import FakeFleet, Gate, Script, Stub, admit_late, latents_of, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from services.coordinator.cancellations import Cancellations

_NUMERICS_FINGERPRINT = "equal"
_MODEL = {"model": "emoji"}
_DENOISING = {"service": "denoising", **_MODEL}


def _value(name: str, labels: Mapping[str, str]) -> float:
    return REGISTRY.get_sample_value(name, dict(labels)) or 0.0


class _Growth:
    """Growth of metrics since the construction of this object."""

    def __init__(self, *series: tuple[str, Mapping[str, str]]) -> None:
        self._before = {(name, frozenset(labels.items())): _value(name, labels) for name, labels in series}

    def grown(self) -> list[float]:
        """Growth of each metric, in the order of `series`."""
        return [_value(name, dict(labels)) - before for (name, labels), before in self._before.items()]


class _Denoiser:
    """Sends a step checkpoint after the first of two steps. The first call then waits at a gate.

    `tokens` has the number of tokens of each call.
    """

    def __init__(self) -> None:
        self.gate = Gate()
        self.tokens: list[int] = []

    def __call__(self, call: Call) -> None:
        self.tokens.append(call.tokens)
        call.progress(1, 2)
        call.checkpoint(StepCheckpoint(step=1, latents=latents_of(torch.zeros(1, 4))))
        if not self.gate.reached.is_set():
            self.gate(call)


def test_lost_worker_is_counted(store_url: str) -> None:
    counted = _Growth(
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
    stored = _Growth(("fleet_step_checkpoint_saves_total", {"result": "stored"}))
    payload = _Growth(("fleet_step_checkpoint_bytes_total", _DENOISING))

    async def scenario(fleet: FakeFleet) -> None:
        denoiser = _Denoiser()
        script = Script(fleet.scripts["denoising"].contract, denoiser)
        await fleet.add_workers(("text_encoding", "latent_preparation", "decoding"))
        worker = await fleet.add_worker("denoising", script, numerics=_NUMERICS_FINGERPRINT, ttl_seconds=1.0)
        _, stub = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        await denoiser.gate.wait_reached()

        async def is_stored() -> bool:
            return stored.grown() == [1]

        await wait_until(is_stored)
        # The retry selects the replacement, which has fewer grants, even if the loss is no longer recorded.
        await fleet.add_worker("denoising", script, numerics=_NUMERICS_FINGERPRINT)
        await worker.die()
        assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        await wait_until(lambda: counted.grown()[0] == 1)  # counted after the store has published the terminal state
        assert counted.grown() == [1, 1, 2, 1, 1, 1, 1, 1, 2, 2]
        assert payload.grown()[0] > 2 * 16, "fewer bytes than two step checkpoints of four float32 values"
        assert len(denoiser.tokens) == 2
        assert set(denoiser.tokens) == {denoiser.tokens[0]} != {0}, "attempts have different token counts, or none"

        async def is_dead() -> bool:
            return (_value("fleet_workers_dead", _DENOISING), _value("fleet_workers_live", _DENOISING)) == (1, 1)

        await wait_until(is_dead)

    run_on_fleet(store_url, scenario)


def test_retry_at_a_full_worker_is_counted(store_url: str) -> None:
    counted = _Growth(("fleet_retried_calls_total", {**_DENOISING, "reason": "full"}))

    async def scenario(fleet: FakeFleet) -> None:
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

    run_on_fleet(store_url, scenario)


def test_service_gauges_match_the_store(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        await fleet.add_workers(("text_encoding", "latent_preparation", "decoding"))
        await fleet.add_worker("denoising", Script(fleet.scripts["denoising"].contract, gate))
        coordinator, stub = await fleet.add_coordinator()
        names = [(await stub.Submit(submission())).request.request_id for _ in range(3)]

        async def are_updated() -> bool:
            gauges = ("fleet_queue_length", "fleet_open_requests", "fleet_workers_held", "fleet_workers_live")
            return [_value(name, _DENOISING) for name in gauges] == [2, 3, 1, 1]

        await wait_until(are_updated)
        assert _value("fleet_queued_seconds", _DENOISING) > 0
        assert _value("fleet_artifact_bytes", {}) == coordinator.artifact_memory.used_bytes > 0
        gate.opened.set()
        for name in names:
            await terminal(stub, name)

    run_on_fleet(store_url, scenario)


def _take_overs() -> _Growth:
    """Take-overs by cause, in the order left, lost, own."""
    series = "fleet_taken_over_requests_total"
    return _Growth(*((series, {**_MODEL, "cause": cause}) for cause in ("left", "lost", "own")))


def test_take_over_from_a_stopped_coordinator_is_counted(store_url: str) -> None:
    """The coordinator stops gracefully, as in a rolling update."""
    counted = _take_overs()

    async def scenario(fleet: FakeFleet) -> None:
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
        assert counted.grown() == [1, 0, 0]

    run_on_fleet(store_url, scenario)


def test_take_over_from_a_killed_coordinator_is_counted(store_url: str) -> None:
    counted = _take_overs()

    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["decoding"].work = gate
        await fleet.add_workers()
        listen = f"unix:{fleet.directory}/c.sock"
        process = await fleet.start_process(listen)
        async with open_channel(listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            name = (await stub.Submit(submission())).request.request_id
            await gate.wait_reached()
            process.kill()
        gate.opened.set()
        _, other = await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
        assert (await terminal(other, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        assert counted.grown() == [0, 1, 0]

    run_on_fleet(store_url, scenario)


def test_take_over_of_a_request_that_its_own_coordinator_does_not_know_is_counted(store_url: str) -> None:
    counted = _take_overs()

    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        await admit_late(fleet, stub)
        assert (await terminal(stub, "late"))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        assert counted.grown() == [0, 0, 1]

    run_on_fleet(store_url, scenario)


@pytest.mark.parametrize("is_reply_lost", [False, True])
def test_cancelled_orphan_is_counted_once(store_url: str, monkeypatch: pytest.MonkeyPatch, is_reply_lost: bool) -> None:
    """The coordinator that ended the request in the store counts it, even if the store's reply was lost."""
    series = ("fleet_requests_total", "fleet_request_duration_seconds_count")
    counted = _Growth(*((name, {**_MODEL, "state": "CANCELLED"}) for name in series))
    request_cancel = RequestStore.request_cancel
    lost: list[str] = []

    async def cancel_and_lose_the_reply(store: RequestStore, request_id: str, *, token: str = "") -> Cancellation:
        cancellation = await request_cancel(store, request_id, token=token)
        if is_reply_lost and not lost:
            lost.append(request_id)
            raise Unavailable("the reply is lost")
        return cancellation

    async def scenario(fleet: FakeFleet) -> None:
        _, stub = await fleet.add_coordinator()
        async with connect(fleet.url) as redis:
            record = pb.RequestRecord(request_id="orphan", model=fleet.model.name)
            await RequestStore(redis, owner="dead").admit(record)
            cancel = pb.CancelRequestRequest(request_id="orphan")
            replies = await asyncio.gather(*(stub.CancelRequest(cancel) for _ in range(4)), return_exceptions=True)
            assert [isinstance(each, BaseException) for each in replies].count(True) == len(lost) == is_reply_lost

            async def is_counted() -> bool:
                return counted.grown() == [1, 1]

            await wait_until(is_counted)
            ended = (await stub.CancelRequest(cancel)).request
            assert ended.state == pb.REQUEST_STATE_CANCELLED
            assert counted.grown() == [1, 1]

    monkeypatch.setattr(RequestStore, "request_cancel", cancel_and_lose_the_reply)
    run_on_fleet(store_url, scenario)


def test_cancellation_that_fails_in_the_store_is_dropped(
    store_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """settle() does not raise, so that housekeeping continues and the coordinator stays ready."""
    errors: list[FleetError] = []

    async def fail(*_: object, token: str) -> Cancellation:
        assert token
        raise errors.pop(0)

    async def scenario() -> None:
        async with connect(store_url) as redis:
            cancellations = Cancellations(RequestStore(redis))
            monkeypatch.setattr(RequestStore, "request_cancel", fail)
            errors[:] = [Unavailable("unavailable"), StoreFull("full"), InternalError("damaged")]
            with pytest.raises(Unavailable):
                await cancellations.cancel("orphan")
            for _ in range(3):  # the third call has no pending cancellation
                await cancellations.settle()
            assert not errors
            assert "cancellation given up error=damaged" in caplog.text

    run_bounded(scenario)


def test_cancellation_without_a_waiting_caller_is_counted(store_url: str) -> None:
    """Housekeeping repeats a cancellation whose caller did not wait for the reply."""
    counted = _Growth(("fleet_requests_total", {**_MODEL, "state": "CANCELLED"}))

    async def scenario() -> None:
        async with connect(store_url) as redis:
            await redis.flushall()
            store = RequestStore(redis)
            cancellations = Cancellations(store)
            await RequestStore(redis, owner="dead").admit(pb.RequestRecord(request_id="orphan", model="emoji"))
            attempt = asyncio.create_task(cancellations.cancel("orphan"))
            await asyncio.sleep(0)
            attempt.cancel()
            await asyncio.wait({attempt})
            for _ in range(2):
                await cancellations.settle()
                assert counted.grown() == [1]
            with pytest.raises(NotFound):
                await cancellations.cancel("nothing")

    run_bounded(scenario)


def test_series_exist_before_the_first_event(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
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

    run_on_fleet(store_url, scenario)
