"""The coordinator's runner of one service: worker slots, lost and full workers, memory of outputs."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import REGISTRY

from async_tests import HANG_SECONDS
from common.errors import FleetError, HandedOver, InvalidInput, ResourceExhausted, Unavailable
from common.pipeline import ServiceSpec
from common.rpc.client import WorkerLost
from common.rpc.framing import Packet
from common.stage import STEP_CHECKPOINTS, Call, Contract
from common.state.leases import Leases
from common.state.worker_slots import FIRST_COME, Computed, WorkerSlot, WorkerSlots
from common.trace_context import Span
from common.wiring import Wiring
from fleet.v1 import artifacts_pb2, worker_pb2
from services.coordinator import worker_runner
from services.coordinator.resume import NewestStepCheckpoint, Recovery
from services.coordinator.worker_runner import ArtifactMemory, Connections, WorkerRunner, Workers

CONTRACT = Contract("text_encoding", {"prompt": "Prompt"}, {"text_conditioning": "Prompt"})
SPEC = ServiceSpec("text_encoding", CONTRACT, ())
RESUMED = frozenset({"resume_from"})
LOOP = ServiceSpec(
    "denoising", Contract("denoising", {"resume_from": "DenoiseState"}, {}, RESUMED, resume_slot="resume_from"), ()
)
CALL = Call("r")


class FakeWorkerSlots(WorkerSlots):
    """Worker slots without a store: each claim gets a slot of a new worker."""

    def __init__(self) -> None:
        self.claimed = 0
        self.released: list[WorkerSlot] = []
        self.computed: list[Computed | None] = []
        self.avoided: list[str] = []
        self.options: list[tuple[object, object]] = []

    async def claim(self, *_: object, **options: object) -> WorkerSlot:
        self.claimed += 1
        self.options.append((options["first"], options["equal_to"]))
        worker = worker_pb2.WorkerInfo(
            worker_id=f"w{self.claimed}", address="here", reports_begun=True, numerics_fingerprint="n1"
        )
        return WorkerSlot(f"t{self.claimed}", "model/text_encoding", worker)

    def release(self, slot: WorkerSlot, used_seconds: float = 0.0, computed: Computed | None = None) -> None:
        del used_seconds
        self.released.append(slot)
        self.computed.append(computed)

    async def avoid(self, worker_id: str) -> float:
        self.avoided.append(worker_id)
        return 0.2


class Network(Connections):
    """Workers that return these replies in order; the last reply repeats."""

    def __init__(self, *replies: Mapping[str, Packet] | FleetError) -> None:
        self.replies = list(replies)
        self.dropped: list[str] = []
        self.calls = 0

    def runner(self, *_: object) -> Network:  # type: ignore[override]
        return self

    def drop(self, address: str) -> None:
        self.dropped.append(address)

    async def __call__(self, values: Mapping[str, Packet], call: Call) -> Mapping[str, Packet]:
        del values, call
        self.calls += 1
        if self.calls > 20:
            raise AssertionError("the request is retried without end")
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, FleetError):
            raise reply
        return reply


class LeavingWorkers(Network):
    """Each worker runs its number of steps, at 1 s per step. Workers before the last hand the call over."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps = list(steps)
        self.resumed_at: list[int] = []

    async def __call__(self, values: Mapping[str, Packet], call: Call) -> Mapping[str, Packet]:
        start = cast(artifacts_pb2.DenoiseState, values["resume_from"].message).step if values else 0
        self.resumed_at.append(start)
        call.on_begun()
        steps = self.steps.pop(0)
        if steps:
            state = Packet(artifacts_pb2.DenoiseState(step=start + steps), {})
            await call.sinks[STEP_CHECKPOINTS].put(start + steps, state, state.byte_size)
        call.on_computed(float(steps))
        if self.steps:
            raise HandedOver("this worker leaves")
        return {}


class FakeLeases(Leases):
    """Leases that store neither step checkpoints nor losses."""

    def __init__(self) -> None:
        pass

    async def save_step_checkpoint(self, *_: object, **__: object) -> bool:
        return True


def output(size: int) -> dict[str, Packet]:
    return {"text_conditioning": Packet(artifacts_pb2.Prompt(prompt="x" * size), {})}


def runner(
    network: Network,
    memory: ArtifactMemory | None = None,
    patience: float | None = None,
    spec: ServiceSpec = SPEC,
) -> tuple[WorkerRunner, FakeWorkerSlots]:
    worker_slots = FakeWorkerSlots()
    workers = Workers(worker_slots, network, memory or ArtifactMemory(1 << 20), patience)
    recovery = Recovery(FakeLeases(), "r")
    wiring = Wiring("", spec.contract.inputs, spec.contract.outputs)
    return WorkerRunner(workers, "model", spec, 0, FIRST_COME, recovery, lambda: None, wiring=wiring), worker_slots


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_runner, "_FIRST_PAUSE_SECONDS", 0.0)


def test_outputs_count_towards_the_memory_until_they_are_freed() -> None:
    memory = ArtifactMemory(10_000)
    run, worker_slots = runner(Network(output(4_000)), memory)
    outputs = asyncio.run(run({}, CALL))
    assert memory.used_bytes == outputs["text_conditioning"].byte_size > 4_000
    assert len(worker_slots.released) == 1
    del outputs, run
    worker_slots.released.clear()
    gc.collect()
    assert memory.used_bytes == 0


def test_outputs_that_exceed_the_memory_end_the_request_and_free_the_worker_slot() -> None:
    """The call is not retried, because another worker would return the same outputs to this coordinator."""
    network = Network(output(4_000))
    run, worker_slots = runner(network, ArtifactMemory(3_000))
    with pytest.raises(ResourceExhausted, match=r"more than max_artifact_bytes \(3000\)"):
        asyncio.run(run({}, CALL))
    assert network.calls == 1
    assert len(worker_slots.released) == worker_slots.claimed == 1


def test_a_call_that_a_full_worker_refuses_is_retried_and_the_worker_is_not_avoided() -> None:
    network = Network(ResourceExhausted("this worker takes 1 calls at a time"), output(1))
    run, worker_slots = runner(network)
    assert asyncio.run(run({}, CALL))
    assert (network.calls, worker_slots.claimed, len(worker_slots.released)) == (2, 2, 2)
    assert not worker_slots.avoided


@pytest.mark.parametrize(
    "error", [ResourceExhausted("too large", field="prompt"), InvalidInput("wrong", field="prompt")]
)
def test_an_error_about_a_value_ends_the_request(error: FleetError) -> None:
    network = Network(error)
    run, worker_slots = runner(network)
    with pytest.raises(type(error)):
        asyncio.run(run({}, CALL))
    assert (network.calls, len(worker_slots.released)) == (1, 1)


def lost_calls(service: str, begun: str) -> float:
    labels = {"service": service, "model": "model", "begun": begun}
    return REGISTRY.get_sample_value("fleet_lost_calls_total", labels) or 0.0


def test_a_handed_over_call_continues_at_once_and_counts_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next claim is first in the queue and gets a worker that can resume. The pace counts steps of each attempt."""

    async def fail(*_: object) -> None:
        raise AssertionError("a loss is counted")

    monkeypatch.setattr(Recovery, "worker_lost", fail)
    monkeypatch.setattr(worker_runner, "_FIRST_PAUSE_SECONDS", 3_600.0)
    network, before = LeavingWorkers(3, 0, 4, 1), [lost_calls("denoising", begun) for begun in ("yes", "no")]
    run, worker_slots = runner(network, patience=0.0, spec=LOOP)
    assert asyncio.run(asyncio.wait_for(run({}, CALL), HANG_SECONDS)) == {}
    assert network.resumed_at == [0, 3, 3, 7]
    assert worker_slots.options == [(False, ""), (True, "n1"), (True, "n1"), (True, "n1")]
    assert worker_slots.computed == [Computed(3.0, 0, 3), Computed(0.0, 3, 0), Computed(4.0, 3, 7), Computed(1.0, 7)]
    assert len(worker_slots.released) == 4
    assert (worker_slots.avoided, network.dropped) == ([], ["here"] * 3)
    assert [lost_calls("denoising", begun) for begun in ("yes", "no")] == before


def test_a_step_checkpoint_is_loaded_before_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the store is unavailable, the request holds no worker slot."""
    run, worker_slots = runner(LeavingWorkers(1), spec=LOOP)
    claimed: list[int] = []

    async def load(_: NewestStepCheckpoint) -> None:
        claimed.append(worker_slots.claimed)

    monkeypatch.setattr(NewestStepCheckpoint, "load", load)
    assert asyncio.run(run({}, CALL)) == {}
    assert claimed[0] == 0


def test_a_call_handed_over_before_its_first_step_checkpoint_fits_any_worker() -> None:
    run, worker_slots = runner(LeavingWorkers(0, 5), spec=LOOP)
    assert asyncio.run(run({}, CALL)) == {}
    assert worker_slots.options == [(False, ""), (True, "")]


def test_a_lost_worker_is_avoided_disconnected_and_counted() -> None:
    network, before = Network(WorkerLost("connection reset"), output(1)), lost_calls("text_encoding", "no")
    run, worker_slots = runner(network)
    assert asyncio.run(run({}, CALL))
    assert (worker_slots.avoided, network.dropped) == (["w1"], ["here"])
    assert lost_calls("text_encoding", "no") == before + 1
    assert len(worker_slots.released) == 2


def test_a_request_that_reaches_no_worker_ends_after_its_patience() -> None:
    network = Network(WorkerLost("connection reset"))
    run, worker_slots = runner(network, patience=0.0)
    with pytest.raises(
        Unavailable, match=r"no worker of text_encoding was reachable for 0 s; last error: connection reset"
    ):
        asyncio.run(run({}, CALL))
    assert len(worker_slots.released) == 1


class _Events(Span):
    """A span that records its events."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | int | float]]] = []

    def event(self, name: str, **attributes: str | int | float) -> None:
        self.found.append((name, attributes))


class _Sink:
    """A sink that accepts every item."""

    async def put(self, index: int, item: Packet, byte_size: int) -> None:
        del index, item, byte_size


def test_an_item_of_a_stream_is_an_event_in_the_span_of_its_attempt() -> None:
    async def scenario() -> None:
        async def settle() -> None:
            pass

        span = _Events()
        recovery = SimpleNamespace(step_checkpoint=SimpleNamespace(settle=settle), has_emitted=False)
        memory = SimpleNamespace(hold=lambda _: None)
        items = worker_runner._WorkerItems("latents", _Sink(), cast(Any, memory), cast(Any, recovery), span)
        await items.put(3, cast(Any, None), 1_024)
        assert span.found == [("item", {"slot": "latents", "index": 3, "bytes": 1_024})]
        assert recovery.has_emitted

    asyncio.run(scenario())
