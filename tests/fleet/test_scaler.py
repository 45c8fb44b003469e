"""KEDA's external scaler in a running coordinator."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from async_tests import wait_until
from certificates import Authority
from common.rpc.client import open_channel
from common.rpc.tls import channel_credentials, read_authority
from common.stage import Call
from coordinator_fleet import FakeFleet, Gate, Stub, error_of, run_on_fleet, submission, terminal
from externalscaler import externalscaler_pb2 as pb
from externalscaler import externalscaler_pb2_grpc
from fleet.v1 import generation_pb2
from services.coordinator.scaler import _POLL_SECONDS
from tls_peers import mutual, tls_files

STEPS = 10
METADATA = {"model": "emoji", "stage": "denoising", "targetSeconds": "4"}


def target(**changed: str) -> pb.ScaledObjectRef:
    metadata = {name: value for name, value in {**METADATA, **changed}.items() if value}
    return pb.ScaledObjectRef(name="denoising", namespace="fleet", scalerMetadata=metadata)


class Keda:
    """KEDA's calls to the external scaler."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub: Any = externalscaler_pb2_grpc.ExternalScalerStub(channel)

    async def value(self, **changed: str) -> float:
        """The current value of the target's metric."""
        (found,) = (await self.stub.GetMetrics(pb.GetMetricsRequest(scaledObjectRef=target(**changed)))).metricValues
        assert found.metricValue >= found.metricValueFloat
        return float(found.metricValueFloat)

    async def is_active(self, **changed: str) -> bool:
        """Whether the target needs a replica."""
        return bool((await self.stub.IsActive(target(**changed))).result)


async def start_scaler(fleet: FakeFleet, **settings: Any) -> tuple[Keda, Any]:
    """Start a coordinator with the scaler; returns the scaler's and the public API's stubs."""
    coordinator, stub = await fleet.add_coordinator(scaler_listen=f"unix:{fleet.directory}/scaler.sock", **settings)
    channel = open_channel(coordinator.scaler_address)
    fleet._stack.push_async_callback(channel.close)
    return Keda(channel), stub


def test_queued_request_activates_its_stages_within_a_second(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        scaler, stub = await start_scaler(fleet)
        assert _POLL_SECONDS < 1  # the test measures no time, because the host may be busy
        activity = aiter(scaler.stub.StreamIsActive(target()))
        assert not (await anext(activity)).result
        assert not await scaler.is_active()
        assert await scaler.value() == 0
        request_id = (await stub.Submit(submission())).request.request_id
        assert (await anext(activity)).result
        assert await scaler.is_active(stage="decoding")
        await stub.CancelRequest(generation_pb2.CancelRequestRequest(request_id=request_id))
        assert not (await anext(activity)).result

        async def nothing_is_queued() -> bool:
            return await scaler.value(stage="text_encoding", metricName="queued_seconds") == 0

        await wait_until(nothing_is_queued)

    run_on_fleet(store_url, scenario)


def test_short_activity_of_a_stage_is_pushed(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        scaler, stub = await start_scaler(fleet)
        activity = aiter(scaler.stub.StreamIsActive(target(stage="text_encoding")))
        assert not (await anext(activity)).result
        for _ in range(3):  # each request needs the stage for less than the polling interval
            request_id = (await stub.Submit(submission())).request.request_id
            assert (await anext(activity)).result
            assert not (await anext(activity)).result
            await terminal(stub, request_id)

    run_on_fleet(store_url, scenario)


def test_metric_is_the_remaining_measured_time_of_requests(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()

        def steps(call: Call) -> None:
            """Run steps of 0.02 s. If `gate.reached` is set, wait at the gate after half of the steps."""
            for step in range(1, STEPS + 1):
                time.sleep(0.02)
                call.progress(step, STEPS)
                if step == STEPS // 2 and gate.reached.is_set():
                    gate(call)

        fleet.scripts["denoising"].work = steps
        await fleet.add_workers()
        scaler, stub = await start_scaler(fleet, step_seconds=0.0, assumed_seconds=7.0)
        request = submission()
        request.parameters.num_inference_steps = STEPS
        first = (await stub.Submit(request)).request.request_id
        assert (await terminal(stub, first))[-1].state_change.state == generation_pb2.REQUEST_STATE_SUCCEEDED
        gate.reached.set()
        request_ids = [(await stub.Submit(request)).request.request_id for _ in range(3)]
        request_seconds = STEPS * 0.02

        async def two_and_a_half_requests_remain() -> bool:
            queued, wanted = await scaler.value(metricName="queued_seconds"), await scaler.value()
            return queued > 2.4 * request_seconds and wanted - 4 == pytest.approx(queued * 2 / 2.5, rel=0.01)

        await wait_until(two_and_a_half_requests_remain)
        assert await scaler.value(targetSeconds="0.001") == pytest.approx(0.003)
        services = {each.service: each for each in (await _model(stub)).services}
        assert services["denoising"].queued_seconds > 2.4 * request_seconds
        assert not services["denoising"].unmeasured
        gate.opened.set()
        for request_id in request_ids:
            await terminal(stub, request_id)
        assert await scaler.value() == 0

    run_on_fleet(store_url, scenario)


async def _model(stub: Stub) -> generation_pb2.Model:
    (model,) = (await stub.ListModels(generation_pb2.ListModelsRequest())).models
    return model


def test_metric_uses_the_assumed_time_until_a_measurement(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        scaler, stub = await start_scaler(fleet, assumed_seconds=7.0)
        await stub.Submit(submission())

        async def is_queued() -> bool:
            return await scaler.value(stage="text_encoding", metricName="queued_seconds") == 7.0

        await wait_until(is_queued)
        assert await scaler.value(stage="text_encoding") == 4.0
        services = {each.service: each for each in (await _model(stub)).services}
        assert services["text_encoding"].unmeasured

    run_on_fleet(store_url, scenario)


def test_metric_spec_has_the_target_seconds_of_one_replica(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        scaler, _ = await start_scaler(fleet)
        (spec,) = (await scaler.stub.GetMetricSpec(target())).metricSpecs
        assert (spec.metricName, spec.targetSize, spec.targetSizeFloat) == ("wanted_seconds", 4, 4.0)
        pushed = await anext(aiter(scaler.stub.StreamMetricSpec(target())))
        assert list(pushed.metricSpecs) == [spec]

    run_on_fleet(store_url, scenario)


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"model": "other"}, "NOT_FOUND", "models are emoji"),
        ({"stage": "image_encoding"}, "NOT_FOUND", "stages are text_encoding, latent_preparation, denoising, decoding"),
        ({"model": ""}, "INVALID_ARGUMENT", "scalerMetadata.model is missing"),
        ({"targetSeconds": ""}, "INVALID_ARGUMENT", "scalerMetadata.targetSeconds is missing"),
        ({"targetSeconds": "0"}, "INVALID_ARGUMENT", "is not a number above 0"),
        ({"targetSeconds": "nan"}, "INVALID_ARGUMENT", "is not a number above 0"),
        ({"metricName": "x"}, "INVALID_ARGUMENT", "is not wanted_seconds or queued_seconds"),
    ],
)
def test_invalid_metadata_is_refused_by_every_rpc(
    store_url: str, changed: dict[str, str], code: str, message: str
) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        scaler, _ = await start_scaler(fleet)
        reference = target(**changed)
        calls = [
            scaler.stub.IsActive(reference),
            anext(aiter(scaler.stub.StreamIsActive(reference))),
            scaler.stub.GetMetricSpec(reference),
            anext(aiter(scaler.stub.StreamMetricSpec(reference))),
            scaler.stub.GetMetrics(pb.GetMetricsRequest(scaledObjectRef=reference)),
        ]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, grpc.aio.AioRpcError)
            assert error_of(result)[0] == code
            assert message in (result.details() or "")

    run_on_fleet(store_url, scenario)


def test_two_coordinators_report_the_same_value(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        scaler, stub = await start_scaler(fleet)
        other, _ = await fleet.add_coordinator(scaler_listen=f"unix:{fleet.directory}/scaler-2.sock")
        channel = open_channel(other.scaler_address)
        fleet._stack.push_async_callback(channel.close)
        for _ in range(3):
            await stub.Submit(submission())

        async def three_are_queued() -> bool:
            return await scaler.value(stage="text_encoding", metricName="queued_seconds") == 30.0

        await wait_until(three_are_queued)
        assert await Keda(channel).value(stage="text_encoding") == await scaler.value(stage="text_encoding") == 12.0

    run_on_fleet(store_url, scenario)


def test_scaler_requires_a_certificate_of_the_fleet(store_url: str, tmp_path: Path) -> None:
    authority, others = Authority(tmp_path / "fleet"), Authority(tmp_path / "others", "somebody else")

    async def outcome(address: str, credentials: grpc.ChannelCredentials) -> str:
        async with open_channel(address, credentials, server_name="coordinator") as channel:
            try:
                await Keda(channel).is_active()
            except grpc.aio.AioRpcError as error:
                return error.code().name
        return "OK"

    async def scenario(fleet: FakeFleet) -> None:
        files = tls_files(authority, "coordinator")
        coordinator, _ = await fleet.add_coordinator(scaler_listen="127.0.0.1:0", **files)
        address = coordinator.scaler_address
        assert await outcome(address, mutual(authority, authority.issue("keda"))) == "OK"
        assert await outcome(address, mutual(authority, others.issue("keda"))) == "UNAVAILABLE"
        assert await outcome(address, channel_credentials(read_authority(authority.ca))) == "UNAVAILABLE"

    run_on_fleet(store_url, scenario)
