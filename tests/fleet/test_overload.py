"""An overloaded fleet: round-robin between callers, a bound on queued seconds, and a retry delay."""

from __future__ import annotations

import hashlib
from pathlib import Path

import grpc
import pytest

from async_tests import wait_until
from common.errors import ResourceExhausted
from common.rpc.status import from_rpc_error
from common.state.connection import connect
from coordinator_fleet import SERVICES, FakeFleet, Gate, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb


def test_callers_are_served_round_robin_at_every_coordinator(store_url: str, tmp_path: Path) -> None:
    callers = ("greedy", "modest")
    keys = tmp_path / "keys.toml"
    digests = {caller: hashlib.sha256(caller.encode()).hexdigest() for caller in callers}
    keys.write_text("".join(f'[callers.{caller}]\nkey_sha256 = ["{digests[caller]}"]\n' for caller in callers))

    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["text_encoding"].work = gate
        await fleet.add_workers()
        stubs = [(await fleet.add_coordinator(api_keys=keys))[1] for _ in range(2)]
        watcher = (await fleet.add_coordinator())[1]
        owners: dict[str, str] = {}

        async def submit(caller: str, number: int) -> None:
            key = (("authorization", f"Bearer {caller}"),)
            accepted = await stubs[number % 2].Submit(submission(), metadata=key)
            owners[accepted.request.request_id] = caller

        async def six_are_queued() -> bool:
            return (await watcher.ListModels(pb.ListModelsRequest())).models[0].services[0].queued == 6

        await submit("greedy", 0)
        await gate.wait_reached()
        for number in range(1, 5):
            await submit("greedy", number)
        for number in range(2):
            await submit("modest", number)
        await wait_until(six_are_queued)
        gate.opened.set()
        for request_id in owners:
            assert (await terminal(watcher, request_id))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        order = [owners[request_id] for request_id in fleet.scripts["text_encoding"].calls]
        assert order == ["greedy", "modest", "greedy", "modest", "greedy", "greedy", "greedy"]

    run_on_fleet(store_url, scenario)


def test_request_beyond_queue_seconds_is_refused_with_a_retry_delay(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator(queue_seconds=60.0)
        first = (await stub.Submit(submission())).request.request_id
        with pytest.raises(grpc.aio.AioRpcError, match="none has ended yet") as caught:
            await stub.Submit(submission())
        refusal = from_rpc_error(caught.value)
        assert isinstance(refusal, ResourceExhausted)
        assert refusal.retry_seconds == 60.0
        gate.opened.set()
        assert (await terminal(stub, first))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        async with connect(store_url) as redis:

            async def all_services_are_measured() -> bool:
                return len(await redis.keys("fleet:pace:*")) == len(SERVICES)

            await wait_until(all_services_are_measured)
        accepted = [(await stub.Submit(submission())).request.request_id for _ in range(3)]
        for request_id in accepted:
            assert (await terminal(stub, request_id))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

    run_on_fleet(store_url, scenario)
