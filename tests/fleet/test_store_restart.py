"""A killed Redis restarts from its append-only file without loss of queued, running or ended requests."""

from __future__ import annotations

import grpc
import pytest

from async_tests import wait_until
from common.state.connection import connect
from coordinator_fleet import FakeFleet, Gate, error_of, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb
from redis_servers import RedisServer

SUCCEEDED = pb.REQUEST_STATE_SUCCEEDED


def test_queued_running_and_ended_requests_survive_a_killed_store(each_server: RedisServer) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        gate.opened.set()
        ended = (await stub.Submit(submission(idempotency_key="ended"))).request.request_id
        before = await terminal(stub, ended)
        gate.opened.clear()
        gate.reached.clear()
        request_ids = [(await stub.Submit(submission(idempotency_key=f"k{n}"))).request.request_id for n in range(5)]
        await gate.wait_reached()  # one request runs, the others are queued at the denoiser or in earlier stages
        each_server.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Submit(submission())
        assert error_of(caught.value)[0] == "UNAVAILABLE"
        each_server.start()
        gate.opened.set()
        for number, request_id in enumerate(request_ids):
            events = await terminal(stub, request_id)
            ends = [event.state_change.state for event in events if event.state_change.state >= SUCCEEDED]
            assert ends == [SUCCEEDED]
            again = await stub.Submit(submission(idempotency_key=f"k{number}"))
            assert (again.replayed, again.request.request_id) == (True, request_id)
        assert await terminal(stub, ended) == before
        assert sorted(fleet.scripts["decoding"].calls) == sorted([ended, *request_ids])

        async def nothing_is_left() -> bool:
            async with connect(fleet.url) as redis:
                kinds = ("queue", "waiting", "slots", "work", "open")
                return not [key for kind in kinds for key in await redis.keys(f"fleet:{kind}:*")]

        await wait_until(nothing_is_left)

    run_on_fleet(each_server.url, scenario)
