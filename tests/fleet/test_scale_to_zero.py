"""A fleet without workers. The coordinator is ready; requests wait for workers, and Watch reports a warning."""

from __future__ import annotations

from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import FailedPrecondition
from common.rpc.client import open_channel
from coordinator_fleet import SERVICES, FakeFleet, run_on_fleet, submission
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import worker_pb2
from services.cli.access import IN_THE_CLEAR
from services.cli.status import _status

WAITS = "no worker of {} is running; the request waits"


def test_requests_wait_for_workers_and_watch_reports_a_warning(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        coordinator, stub = await fleet.add_coordinator(worker_wait_seconds=30.0)
        async with open_channel(coordinator.address) as channel:
            health_stub: Any = health_pb2_grpc.HealthStub(channel)
            health = await health_stub.Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
        assert model.name == "emoji"
        assert {each.service: each.workers for each in model.services} == dict.fromkeys(SERVICES, 0)
        request_id = (await stub.Submit(submission())).request.request_id
        warned: list[str] = []
        last = None
        async for reply in stub.Watch(pb.WatchRequest(request_id=request_id)):
            last = reply.event
            if last.HasField("warning"):
                warned.append(last.warning.message)
                (missing,) = [service for service in SERVICES if last.warning.message == WAITS.format(service)]
                await fleet.add_worker(missing)
        assert last is not None
        assert last.state_change.state == pb.REQUEST_STATE_SUCCEEDED
        assert sorted(warned) == sorted(WAITS.format(service) for service in SERVICES), "not one warning per service"

    run_on_fleet(store_url, scenario)


def test_request_with_live_workers_has_no_warning(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        request_id = (await stub.Submit(submission())).request.request_id
        events = [reply.event async for reply in stub.Watch(pb.WatchRequest(request_id=request_id))]
        assert events[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        assert not [event for event in events if event.HasField("warning")]

    run_on_fleet(store_url, scenario)


def test_worker_with_another_checkpoint_is_refused_and_listed(
    store_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        coordinator, stub = await fleet.add_coordinator()
        worker = await fleet.add_worker("denoising")
        other = worker_pb2.WorkerInfo()
        other.CopyFrom(worker.info)
        other.worker_id, other.model_fingerprint = "denoising-pod-7-1-ab", "f" * 64
        for _ in range(2):
            with pytest.raises(FailedPrecondition, match="serve it under another name"):
                await worker.registry.announce(other)
        (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
        (refused,) = model.refused_workers
        assert (refused.worker_id, refused.service) == (other.worker_id, "denoising")
        assert refused.model_fingerprint == other.model_fingerprint
        assert "fingerprint" in refused.reason
        assert {each.service: each.workers for each in model.services}["denoising"] == 1
        assert await _status(coordinator.address, IN_THE_CLEAR) == 0
        lines = capsys.readouterr().out.splitlines()
        (line,) = [line for line in lines if other.worker_id in line]
        assert line.split()[:3] == ["emoji", "denoising", other.worker_id]
        assert f"this checkpoint has {other.model_fingerprint}" in line

    run_on_fleet(store_url, scenario)
