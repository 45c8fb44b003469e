"""A coordinator with `store_replicas` accepts and ends requests only after a replica has the write."""

from __future__ import annotations

import tempfile
from pathlib import Path

import grpc
import pytest

from coordinator_fleet import FakeFleet, Stub, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb
from sentinel_servers import Replicated, replicated_servers

REFUSAL = "store_replicas: 0 replicas"


async def submit(stub: Stub, request: pb.SubmitRequest) -> pb.SubmitResponse:
    """Submit a request with an idempotency key; repeats while the replica, on a busy host, acknowledges too late."""
    while True:
        try:
            return await stub.Submit(request)
        except grpc.aio.AioRpcError as error:
            if REFUSAL not in (error.details() or ""):
                raise


def test_request_is_accepted_only_with_a_replica() -> None:
    async def scenario(fleet: FakeFleet, servers: Replicated) -> None:
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator(store_replicas=1)
        accepted = (await submit(stub, submission(idempotency_key="j"))).request.request_id
        assert (await terminal(stub, accepted))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

        servers.stop_replica()
        keyed = submission(idempotency_key="k")
        with pytest.raises(grpc.aio.AioRpcError, match=REFUSAL) as refused:
            await stub.Submit(keyed)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        servers.continue_replica()
        # The primary has stored the request: the retry is a replay, and the request succeeds once the replica runs.
        again = await submit(stub, keyed)
        assert again.replayed
        assert (await terminal(stub, again.request.request_id))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

    with (
        tempfile.TemporaryDirectory(prefix="fleet-replicas-") as directory,
        replicated_servers(Path(directory)) as servers,
    ):
        run_on_fleet(servers.url, lambda fleet: scenario(fleet, servers))
