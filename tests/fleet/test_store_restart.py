"""Redis is killed and started again on its append-only file while requests are in every state: none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest

from common.state.connection import connect
from coordinator_fleet import FakeFleet, Gate, emoji, error_of, running_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb
from redis_servers import RedisServer, running_server, server_binaries, until

TERMINAL = pb.REQUEST_STATE_SUCCEEDED


@pytest.fixture(params=sorted(server_binaries()))
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with running_server(request.param) as server:
        yield server


def test_requests_that_wait_run_and_have_ended_outlive_a_killed_store(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        gate.opened.set()
        ended = (await stub.Submit(submission(idempotency_key="ended"))).request.request_id
        before = await terminal(stub, ended)
        gate.opened.clear()
        gate.reached.clear()
        names = [(await stub.Submit(submission(idempotency_key=f"k{n}"))).request.request_id for n in range(5)]
        await gate.wait_reached()  # one runs, others wait for the denoiser, or are under way to it
        server.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Submit(submission())
        assert error_of(caught.value)[0] == "UNAVAILABLE"
        server.start()
        gate.opened.set()
        for number, name in enumerate(names):
            events = await terminal(stub, name)
            ends = [event.state_change.state for event in events if event.state_change.state >= TERMINAL]
            assert ends == [TERMINAL]
            again = await stub.Submit(submission(idempotency_key=f"k{number}"))
            assert (again.replayed, again.request.request_id) == (True, name)
        assert await terminal(stub, ended) == before
        assert sorted(fleet.scripts["decoding"].calls) == sorted([ended, *names])

        async def nothing_is_left() -> bool:
            async with connect(fleet.url) as redis:
                kinds = ("queue", "waiting", "slots", "work", "open")
                return not [key for kind in kinds for key in await redis.keys(f"fleet:{kind}:*")]

        await until(nothing_is_left)

    async def main() -> None:
        async with asyncio.timeout(60), running_fleet(server.url, emoji()) as fleet:
            await story(fleet)

    asyncio.run(main())
