"""Items emitted by workers: delivery after their step checkpoint is stored, and retries after items."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import cast

import pytest

from async_tests import HANG_SECONDS
from common.errors import ResourceExhausted
from common.pipeline import ServiceSpec
from common.rpc.client import WorkerLost
from common.rpc.framing import Packet
from common.stage import STEP_CHECKPOINTS, Call, Contract
from common.state.leases import Leases
from common.state.worker_slots import FIRST_COME, WorkerSlot, WorkerSlots
from common.wiring import Wiring
from fleet.v1 import artifacts_pb2, worker_pb2
from services.coordinator.resume import Recovery
from services.coordinator.worker_runner import ArtifactMemory, Connections, WorkerRunner, Workers

BLOCKS = "denoised_blocks"
OUTPUTS = {BLOCKS: "Stream[Latents]"}
LOOP = ServiceSpec(
    "denoising",
    Contract(
        "denoising", {"resume_from": "DenoiseState"}, OUTPUTS, frozenset({"resume_from"}), resume_slot="resume_from"
    ),
    (),
)


class FakeWorkerSlots(WorkerSlots):
    """Worker slots; each claim returns a worker with a different numerics fingerprint."""

    def __init__(self) -> None:
        self.claimed = 0

    async def claim(self, *_: object, **__: object) -> WorkerSlot:
        self.claimed += 1
        worker = worker_pb2.WorkerInfo(
            worker_id=f"w{self.claimed}", address="here", reports_begun=True, numerics_fingerprint=f"n{self.claimed}"
        )
        return WorkerSlot(f"t{self.claimed}", "model/denoising", worker)

    def release(self, *_: object) -> None:
        pass

    async def avoid(self, worker_id: str) -> float:
        del worker_id
        return 0.0


class DyingWorkers(Connections):
    """The first worker sends the step checkpoint of step 3, then `items` items, and fails. The second succeeds."""

    def __init__(self, items: int) -> None:
        self.items = items
        self.started_at: list[int] = []

    def runner(self, *_: object) -> DyingWorkers:  # type: ignore[override]
        return self

    def drop(self, address: str) -> None:
        del address

    async def __call__(self, values: Mapping[str, Packet], call: Call) -> Mapping[str, Packet]:
        start = cast(artifacts_pb2.DenoiseState, values["resume_from"].message).step if values else 0
        self.started_at.append(start)
        if len(self.started_at) > 1:
            return {}
        await call.sinks[STEP_CHECKPOINTS].put(3, Packet(artifacts_pb2.DenoiseState(step=3), {}), 0)
        for index in range(self.items):
            await call.sinks[BLOCKS].put(index, Packet(artifacts_pb2.Latents(), {}), 0)
        raise WorkerLost("connection reset")


class SlowLeases(Leases):
    """Stores a step checkpoint after 50 ms, then appends an entry to `log`."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    async def save_step_checkpoint(self, *_: object, step: int, **__: object) -> bool:
        await asyncio.sleep(0.05)
        self.log.append(f"checkpoint {step}")
        return True


class LoggedSink:
    """A sink that appends the index of each item to a log."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    async def put(self, index: int, item: Packet, byte_size: int) -> None:
        del item, byte_size
        self.log.append(f"item {index}")


def run(items: int, max_bytes: int = 1 << 20) -> tuple[list[int], list[str]]:
    """Step at which each worker starts, and the log of stored step checkpoints and delivered items."""
    log: list[str] = []
    network = DyingWorkers(items)

    async def scenario() -> None:
        workers = Workers(FakeWorkerSlots(), network, ArtifactMemory(max_bytes))
        recovery = Recovery(SlowLeases(log), "r")
        wiring = Wiring("", LOOP.contract.inputs, LOOP.contract.outputs)
        runner = WorkerRunner(workers, "model", LOOP, 0, FIRST_COME, recovery, lambda: None, wiring=wiring)
        assert await runner({}, Call("r", sinks={BLOCKS: LoggedSink(log)})) == {}
        await recovery.step_checkpoint.close()

    asyncio.run(asyncio.wait_for(scenario(), HANG_SECONDS))
    return network.started_at, log


def test_an_item_is_delivered_after_its_step_checkpoint_is_stored() -> None:
    assert run(items=2)[1] == ["checkpoint 3", "item 0", "item 1"]


def test_a_retry_after_an_item_continues_despite_other_numerics() -> None:
    assert run(items=1)[0] == [0, 3]


def test_a_retry_before_the_first_item_restarts_if_numerics_differ() -> None:
    assert run(items=0)[0] == [0, 0]


def test_items_beyond_the_memory_limit_raise_an_error_with_their_slot() -> None:
    with pytest.raises(ResourceExhausted) as raised:
        run(items=1, max_bytes=-1)
    assert raised.value.field == BLOCKS
