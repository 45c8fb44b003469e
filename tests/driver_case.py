"""A driver with a fake store, leases and worker slots, and one request that a test can block."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import cast

from async_tests import HANG_SECONDS, wait_until
from common.errors import NotFound
from common.pipeline import ServiceSpec, StageSpec
from common.rpc.framing import Packet
from common.stage import Contract
from common.state.leases import Inherited, Leases, Loss
from common.state.records import ResultFile, State, StateValue
from common.state.requests import Admission, AdmissionLimits, RequestStore
from common.state.worker_slots import WorkerSlot, WorkerSlots
from fleet.v1 import artifacts_pb2
from fleet.v1 import generation_pb2 as pb
from services.coordinator.driver import Driver
from services.coordinator.request_life import ExecutionContext, Phase, Submission
from services.coordinator.worker_runner import ArtifactMemory, Connections, Workers

_CONTRACT = Contract("drawing", {"prompt": "Prompt"}, {"media": "Media"})
SPEC = ServiceSpec("drawing", _CONTRACT, (StageSpec(_CONTRACT, "drawing", "none:Stage", result="media"),))
CANCELLED, FAILED = State.REQUEST_STATE_CANCELLED, State.REQUEST_STATE_FAILED


class Gate:
    """Blocks calls until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()

    async def wait(self) -> None:
        self.reached.set()
        await self.opened.wait()


class Store(RequestStore):
    """A store of one request. admit(), get() and finish() each wait at their gate if the test has set it.

    After its gate, admit() raises `admit_error` if `admit_error` is set.
    """

    def __init__(self) -> None:
        self.admit_gate: Gate | None = None
        self.get_gate: Gate | None = None
        self.finish_gate: Gate | None = None
        self.admit_error: Exception | None = None
        self.is_stored = True
        self.deadline_seconds = 0
        """Seconds between admission and deadline of the stored request; 0: no deadline."""
        self.replayed = False
        self.epoch = 1
        self.ends: list[tuple[int, StateValue, str]] = []

    async def admit(self, record: pb.RequestRecord, **_: object) -> Admission:
        if self.admit_gate:
            await self.admit_gate.wait()
        if self.admit_error:
            raise self.admit_error
        return Admission(record, self.replayed, None, [])

    async def get(self, request_id: str) -> pb.RequestRecord:
        if self.get_gate:
            await self.get_gate.wait()
        if not self.is_stored:
            raise NotFound("it was not stored")
        record = pb.RequestRecord(request_id=request_id)
        if self.deadline_seconds:
            record.created_at.FromSeconds(1_000)
            record.deadline.FromSeconds(1_000 + self.deadline_seconds)
        return record

    async def append(self, request_id: str, events: Iterable[pb.Event], **_: object) -> list[pb.Event]:
        del request_id
        return list(events)

    async def finish(
        self,
        request_id: str,
        state: StateValue,
        *,
        error: pb.Error | None = None,
        files: Iterable[ResultFile] = (),
        epoch: int = 1,
        **_: object,
    ) -> list[pb.Event] | None:
        del request_id, files
        if self.finish_gate:
            await self.finish_gate.wait()
        if epoch != self.epoch:
            return None
        self.ends.append((epoch, state, error.message if error else ""))
        return []


class Owners(Leases):
    """Leases of other coordinators. Each take_over() returns the next list of `given`, then empty lists."""

    def __init__(self) -> None:
        self.given: list[list[Inherited]] = []
        self.cancelled: list[str] = []
        self.running: list[list[str]] = []

    async def take_over(
        self, model: str, *, running: Iterable[str] = (), beyond_own: bool = True
    ) -> tuple[list[Inherited], list[str]]:
        del model, beyond_own
        self.running.append(list(running))
        await asyncio.sleep(0)
        return (self.given.pop(0) if self.given else []), self.cancelled

    async def losses(self, request_id: str, epoch: int) -> list[Loss]:
        del request_id, epoch
        return []


class Queue(WorkerSlots):
    """A queue whose claims wait until they are cancelled."""

    def __init__(self) -> None:
        self.claims: list[str] = []
        self.most_at_once = self.waiting = 0

    async def claim(self, model: str, service: str, request_id: str, *_: object, **__: object) -> WorkerSlot:
        del model, service
        self.claims.append(request_id)
        self.waiting += 1
        self.most_at_once = max(self.most_at_once, self.waiting)
        try:
            await asyncio.Event().wait()
        finally:
            self.waiting -= 1
        raise AssertionError


class Case:
    """A driver with fakes, and the request "r"."""

    def __init__(self) -> None:
        self.store, self.owners, self.queue = Store(), Owners(), Queue()
        workers = Workers(self.queue, cast(Connections, None), ArtifactMemory(1 << 20))
        self.driver = Driver(
            ExecutionContext(self.store, self.owners, workers, max_raw_result_bytes=100, max_result_bytes=100)
        )

    @property
    def phases(self) -> list[Phase]:
        return [execution.phase for execution in self.driver._open]

    async def wait_until(self, *phases: Phase) -> None:
        """Wait until the executions of the request, in order of epoch, are in these phases."""

        async def are_reached() -> bool:
            return self.phases == list(phases)

        await wait_until(are_reached)

    async def run(self, *, key: str = "k", raw: bool = False) -> None:
        """Accept the request, whose stage waits for a worker slot."""
        await self.driver.accept(submission(key=key, raw=raw))
        await self.wait_until(Phase.RUNNING)
        await self.claimed(1)

    async def claimed(self, count: int) -> None:
        """Wait until the driver has made at least `count` claims."""

        async def are_made() -> bool:
            return len(self.queue.claims) >= count

        await wait_until(are_made)

    async def inherit(self, epoch: int = 2, *, cancel: bool = False) -> None:
        """Take over the request in the given epoch."""
        self.store.epoch = epoch
        record = pb.RequestRecord(request_id="r", model="emoji")
        self.owners.given.append([Inherited(record, epoch, b"stored", cancel, None, "lost")])
        await self.driver.take_over("emoji", restore)


def submission(*, key: str = "k", raw: bool = False) -> Submission:
    packets = {"prompt": Packet(artifacts_pb2.Prompt(prompt="x"), {})}
    record = pb.RequestRecord(request_id="r", model="emoji")
    return Submission(record, (SPEC,), packets, AdmissionLimits(), key, raw=raw, stored=b"stored")


def restore(record: pb.RequestRecord, stored: bytes) -> Submission:
    assert (record.request_id, stored) == ("r", b"stored")
    return submission()


def run_case(test: Callable[[Case], Awaitable[None]]) -> Case:
    """Run a test; asserts that no task raises an unhandled exception."""
    defects: list[object] = []

    async def main() -> Case:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: defects.append(context))
        case = Case()
        async with asyncio.timeout(HANG_SECONDS):
            await test(case)
        return case

    case = asyncio.run(main())
    assert not defects
    return case
