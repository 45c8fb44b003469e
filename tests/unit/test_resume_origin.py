"""Step checkpoints: their origins, and saving, finding and loading the newest step checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from common.errors import NotFound, Unavailable
from common.rpc.framing import Packet
from common.state import retries
from common.state.leases import Leases
from fleet.v1 import artifacts_pb2
from services.coordinator.resume import NewestStepCheckpoint, origin_of


def prompt(text: str) -> Packet:
    return Packet(artifacts_pb2.Prompt(prompt=text), {})


def state(step: int) -> Packet:
    return Packet(artifacts_pb2.DenoiseState(step=step), {})


def test_an_origin_depends_on_numerics_slots_and_values() -> None:
    origins = [
        origin_of("a", {"prompt": prompt("x")}),
        origin_of("b", {"prompt": prompt("x")}),
        origin_of("a", {"prompt": prompt("y")}),
        origin_of("a", {"other": prompt("x")}),
        origin_of("a", {"other": prompt("x"), "prompt": prompt("x")}),
    ]
    assert len(set(origins)) == len(origins)
    both = {"other": prompt("x"), "prompt": prompt("x")}
    assert origin_of("a", dict(reversed(both.items()))) == origins[-1]


class FakeLeases(Leases):
    """Leases that record number and step of each saved step checkpoint, and load `stored`."""

    def __init__(self, stored: list[bytes] | Exception | None = None) -> None:
        self.stored = stored
        self.saved: list[tuple[int, int]] = []

    async def save_step_checkpoint(
        self, request_id: str, epoch: int, number: int, parts: Iterable[bytes], *, step: int
    ) -> bool:
        del request_id, epoch, parts
        self.saved.append((number, step))
        await asyncio.sleep(0)
        return True

    async def load_step_checkpoint(self, request_id: str) -> list[bytes]:
        if isinstance(self.stored, list):
            return self.stored
        raise self.stored or NotFound(f"request {request_id} has no step checkpoint")


def test_a_step_checkpoint_of_another_origin_is_not_resumed() -> None:
    async def scenario() -> None:
        newest = NewestStepCheckpoint(FakeLeases(), "r", 1)
        newest.remember("here", state(4))
        assert await newest.find("elsewhere", "resume_from") is None
        found = await newest.find("here", "resume_from")
        assert found is not None
        assert found.message == artifacts_pb2.DenoiseState(step=4)
        await newest.close()

    asyncio.run(scenario())


def test_while_the_store_is_slow_only_the_newest_step_checkpoint_is_saved() -> None:
    async def scenario() -> None:
        leases = FakeLeases()
        newest = NewestStepCheckpoint(leases, "r", 1)
        newest.remember("here", state(1))
        await asyncio.sleep(0)
        for step in range(2, 9):
            newest.remember("here", state(step))
        await newest.settle()
        assert leases.saved == [(0, 1), (1, 8)]

    asyncio.run(scenario())


def test_the_next_owner_loads_the_stored_step_checkpoint() -> None:
    async def scenario() -> None:
        stored = [b"here", artifacts_pb2.DenoiseState(step=7).SerializeToString()]
        # The first owner of a request loads no step checkpoint from the store.
        assert await NewestStepCheckpoint(FakeLeases(stored), "r", 1).find("here", "resume_from") is None
        assert (
            await NewestStepCheckpoint(FakeLeases(stored), "r", 2, inherited=True).find("elsewhere", "resume_from")
            is None
        )
        found = await NewestStepCheckpoint(FakeLeases(stored), "r", 2, inherited=True).find("here", "resume_from")
        assert found is not None
        assert found.message == artifacts_pb2.DenoiseState(step=7)

    asyncio.run(scenario())


def test_loading_a_step_checkpoint_waits_for_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_RETRY_SECONDS", 0.001)
    leases = FakeLeases([b"here", artifacts_pb2.DenoiseState(step=7).SerializeToString()])
    load, failures = leases.load_step_checkpoint, [Unavailable("the store is unavailable")] * 3

    async def load_after_failures(request_id: str) -> list[bytes]:
        if failures:
            raise failures.pop()
        return await load(request_id)

    monkeypatch.setattr(leases, "load_step_checkpoint", load_after_failures)
    found = asyncio.run(NewestStepCheckpoint(leases, "r", 2, inherited=True).find("here", "resume_from"))
    assert found is not None
    assert found.message == artifacts_pb2.DenoiseState(step=7)
    assert not failures


@pytest.mark.parametrize("stored", [None, [b"here", b"\xff"], [b"only one part"]])
def test_an_unreadable_step_checkpoint_restarts_the_loop(stored: list[bytes] | Exception | None) -> None:
    assert (
        asyncio.run(NewestStepCheckpoint(FakeLeases(stored), "r", 2, inherited=True).find("here", "resume_from"))
        is None
    )
