"""A store without free memory: submissions fail with a retry delay, and accepted requests finish."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from async_tests import wait_until
from common.errors import ResourceExhausted
from common.rpc.client import open_channel
from common.rpc.status import from_rpc_error
from common.state.connection import connect
from coordinator_fleet import FakeFleet, Gate, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb
from redis_servers import fill, running_server, unfill
from services.cli.status_cells import store_text
from services.coordinator.store_watch import SUBMIT_HEALTH

MIB = 1 << 20
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server("valkey", "--maxmemory", str(40 * MIB)) as server:
        yield server.url


def test_full_store_refuses_new_requests_and_finishes_accepted_requests(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        coordinator, stub = await fleet.add_coordinator()
        accepted = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        async with connect(url) as redis, open_channel(coordinator.address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)

            async def is_submit_served(status: int) -> bool:
                reply = await health.Check(health_pb2.HealthCheckRequest(service=SUBMIT_HEALTH))
                return bool(reply.status == status)

            assert await is_submit_served(SERVING)
            await fill(redis, 37 * MIB)
            await wait_until(lambda: is_submit_served(NOT_SERVING))
            with pytest.raises(grpc.aio.AioRpcError, match="the request store is full") as caught:
                await stub.Submit(submission())
            refusal = from_rpc_error(caught.value)
            assert isinstance(refusal, ResourceExhausted)
            assert refusal.retry_seconds == 5.0
            overall = await health.Check(health_pb2.HealthCheckRequest())
            assert overall.status == SERVING  # calls about open requests must still be routed to the coordinator
            store = (await stub.ListModels(pb.ListModelsRequest())).store
            assert store.is_full
            assert store.max_bytes == 40 * MIB
            assert store_text(store).endswith("full: requests are refused above 36.0 MiB")
            gate.opened.set()
            assert (await terminal(stub, accepted))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
            await unfill(redis)
            await wait_until(lambda: is_submit_served(SERVING))
            later = (await stub.Submit(submission())).request.request_id
            assert (await terminal(stub, later))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
            assert store_text((await stub.ListModels(pb.ListModelsRequest())).store).endswith("refused above 36.0 MiB")

    run_on_fleet(url, scenario)
    logged = [record.getMessage() for record in caplog.records]
    assert [each for each in logged if each.startswith("request store is full, Submit is refused")]
    assert not [each for each in logged if "is unavailable" in each]


def test_repaired_store_entries_are_logged_and_counted(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        async with connect(url) as redis:
            orphan = "100|nobody|00000|1|gone/gone/0|gone"
            await redis.zadd(f"fleet:queue:{fleet.model.name}/denoising", {orphan: 0})
        accepted = (await stub.Submit(submission())).request.request_id
        assert (await terminal(stub, accepted))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

        async def is_logged() -> bool:
            return any("kind=queue count=1" in record.getMessage() for record in caplog.records)

        await wait_until(is_logged)

    run_on_fleet(url, scenario)
