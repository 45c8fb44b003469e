"""Real processes export one trace per request to an OTLP receiver, even if processes are killed.

The clocks of the processes are skewed, so that spans of different processes have no order in time.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Mapping, Sequence
from functools import partial

import pytest

from async_tests import HANG_SECONDS
from coordinator_fleet import Stub
from fleet.v1 import generation_pb2 as pb
from otlp_receiver import ReceivedSpan, Receiver, receiving
from resume_fleet import STEPS, Family, Served, served

FLUX = Family("emoji", {"height": 384, "width": 384}, b"\x89PNG")
# Different prompts, so that no reply is read from the cache.
PROMPTS = (f"a red heart moving left, number {number}" for number in itertools.count())
PROMPT_WORDS = (b"heart", b"moving", b"left", b"number")
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
STAGES = {
    "text_encoding": ["TextEncodingStage"],
    "latent_preparation": ["LatentPreparationStage", "TimestepPreparationStage"],
    "denoising": ["DenoisingStage"],
    "decoding": ["DecodingStage"],
}
TRANSFERS = ["receive outputs", "send inputs"]


async def submit(stub: Stub, traceparent: str = "") -> str:
    parameters = pb.GenerationParameters(prompt=next(PROMPTS), seed=3, num_inference_steps=STEPS, **FLUX.given)
    metadata = (("traceparent", traceparent), ("tracestate", "vendor=1")) if traceparent else ()
    return (await stub.Submit(pb.SubmitRequest(parameters=parameters), metadata=metadata)).request.request_id


class Trace:
    """The spans of a request's trace."""

    def __init__(self, spans: Sequence[ReceivedSpan], request_id: str) -> None:
        roots = [each for each in spans if each.name == "request"]
        (self.root,) = [each for each in roots if each.attributes["fleet.request_id"] == request_id]
        self.spans = [each for each in spans if each.trace_id == self.root.trace_id]

    def child_names(self, parent: ReceivedSpan) -> list[str]:
        """Sorted names of a span's children."""
        return sorted(each.name for each in self.spans if each.parent_id == parent.span_id)

    def named(self, name: str) -> list[ReceivedSpan]:
        """Spans with this name, in order of their start."""
        return sorted((each for each in self.spans if each.name == name), key=lambda each: each.start)

    def check_attempt(self, attempt: ReceivedSpan, service: str) -> ReceivedSpan:
        """Check a successful attempt and its descendants; returns the worker's span."""
        assert attempt.parent_id == self.root.span_id
        assert (attempt.kind, attempt.error, attempt.service) == ("CLIENT", "", "fleet-coordinator")
        assert attempt.events[0][0] == "begun"
        assert self.child_names(attempt) == sorted([*TRANSFERS, f"serve {service}"])
        (worker,) = [each for each in self.named(f"serve {service}") if each.parent_id == attempt.span_id]
        assert (worker.kind, worker.error, worker.service) == ("SERVER", "", f"fleet-{service}")
        stages = [f"stage {stage}" for stage in STAGES[service]]
        assert self.child_names(worker) == sorted(["receive inputs", "send outputs", "wait for device", *stages])
        for each in self.spans:
            if each.name.startswith(("send", "receive")):
                assert each.attributes["fleet.bytes"] > 0
        return worker

    def child_bytes(self, parent: ReceivedSpan) -> Mapping[str, int]:
        """Transferred bytes of a span's children, by name."""
        children = [each for each in self.spans if each.parent_id == parent.span_id]
        return {each.name: each.attributes["fleet.bytes"] for each in children if "fleet.bytes" in each.attributes}


async def trace_of(receiver: Receiver, request_id: str, **counts: int) -> Trace:
    """Wait for the complete trace of an ended request.

    `counts` are minimum numbers of attempts by service. The root ends after all other spans of its coordinator,
    and arrives with them or after them.
    """

    def complete_trace() -> Trace:
        spans = receiver.wait_until(lambda spans: any(_is_root(each, request_id) for each in spans))
        trace_id = Trace(spans, request_id).root.trace_id

        def is_complete(spans: Sequence[ReceivedSpan]) -> bool:
            names = [each.name for each in spans if each.trace_id == trace_id]
            return all(
                names.count(f"attempt {service}") >= counts.get(service, 1)
                and f"stage {stages[-1]}" in names
                # the worker's span ends last
                and f"serve {service}" in names
                for service, stages in STAGES.items()
            )

        return Trace(receiver.wait_until(is_complete), request_id)

    return await asyncio.to_thread(complete_trace)


def _is_root(span: ReceivedSpan, request_id: str) -> bool:
    return span.name == "request" and span.attributes["fleet.request_id"] == request_id


async def check_without_faults(fleet: Served, receiver: Receiver) -> None:
    request_id = await submit(fleet.stubs[0])
    await fleet.result(fleet.stubs[0], request_id)
    trace = await trace_of(receiver, request_id)
    assert (trace.root.kind, trace.root.parent_id, trace.root.error) == ("SERVER", "", "")
    assert trace.root.attributes["fleet.state"] == "SUCCEEDED"
    queues_and_attempts = [f"{kind} {service}" for service in STAGES for kind in ("queue", "attempt")]
    assert trace.child_names(trace.root) == sorted(["accept", *queues_and_attempts, "store end"])
    for service in STAGES:
        (attempt,) = trace.named(f"attempt {service}")
        worker = trace.check_attempt(attempt, service)
        sent, received = trace.child_bytes(attempt), trace.child_bytes(worker)
        assert sent["send inputs"] == received["receive inputs"]
        assert sent["receive outputs"] == received["send outputs"]
    (denoising,) = trace.named("stage DenoisingStage")
    assert denoising.steps("step") == list(range(1, STEPS + 1))
    checkpoints = trace.named("attempt denoising")[0].steps("checkpoint")
    assert checkpoints
    assert checkpoints == sorted(set(checkpoints))


async def check_client_context(fleet: Served, receiver: Receiver) -> None:
    request_id = await submit(fleet.stubs[0], f"00-{TRACE_ID}-{PARENT_ID}-01")
    await fleet.result(fleet.stubs[0], request_id)
    trace = await trace_of(receiver, request_id)
    assert (trace.root.trace_id, trace.root.parent_id) == (TRACE_ID, PARENT_ID)
    # An unsampled trace is not exported, but its context is propagated.
    request_id = await submit(fleet.stubs[0], f"00-{'a' * 32}-{PARENT_ID}-00")
    await fleet.result(fleet.stubs[0], request_id)
    (record,) = [each for each in await records(fleet.stubs[0]) if each.request_id == request_id]
    assert record.trace.traceparent.startswith(f"00-{'a' * 32}-")
    assert record.trace.traceparent.endswith("-00")


async def records(stub: Stub) -> Sequence[pb.RequestRecord]:
    return (await stub.ListRequests(pb.ListRequestsRequest())).requests


async def check_lost_worker(fleet: Served, receiver: Receiver) -> None:
    request_id = await submit(fleet.stubs[0])
    await fleet.result(fleet.stubs[0], request_id, STEPS // 2, fleet.kill_worker)
    trace = await trace_of(receiver, request_id, denoising=2)
    lost, second = sorted(trace.named("attempt denoising"), key=lambda each: each.attributes["fleet.attempt"])
    assert [each.attributes["fleet.attempt"] for each in (lost, second)] == [1, 2]
    assert lost.error == "WorkerLost"
    assert lost.attributes["fleet.worker"] != second.attributes["fleet.worker"]
    assert lost.parent_id == trace.root.span_id
    worker = trace.check_attempt(second, "denoising")
    resumed_at = second.attributes["fleet.resumed_at_step"]
    assert resumed_at == lost.steps("checkpoint")[-1] > 0
    (denoising,) = [each for each in trace.named("stage DenoisingStage") if each.parent_id == worker.span_id]
    assert denoising.steps("step") == list(range(resumed_at + 1, STEPS + 1))
    assert len(trace.named("queue denoising")) == 2


async def check_take_over(fleet: Served, receiver: Receiver) -> None:
    """Kill coordinator and worker: another coordinator ends the root span of the first coordinator."""
    trace_id = secrets.token_hex(16)
    request_id = await submit(fleet.stubs[1], f"00-{trace_id}-{PARENT_ID}-01")
    (record,) = [each for each in await records(fleet.stubs[0]) if each.request_id == request_id]

    def are_exported(spans: Sequence[ReceivedSpan]) -> bool:
        names = {each.name for each in spans if each.trace_id == trace_id}
        return {"attempt text_encoding", "attempt latent_preparation"} <= names

    async def kill_both(name: str) -> None:
        """Kill the processes once the coordinator has exported its ended attempts."""
        await asyncio.to_thread(receiver.wait_until, are_exported)
        await fleet.kill_both(name)

    await fleet.result(fleet.stubs[0], request_id, STEPS // 2, kill_both)
    trace = await trace_of(receiver, request_id, text_encoding=2, latent_preparation=2)
    assert record.trace.traceparent == f"00-{trace_id}-{trace.root.span_id}-01"
    assert record.trace.client_traceparent == f"00-{trace_id}-{PARENT_ID}-01"
    assert record.trace.tracestate == "vendor=1"
    assert trace.root.parent_id == PARENT_ID
    assert trace.root.start == record.created_at.ToNanoseconds()
    assert trace.root.end >= trace.root.start
    (taken_over,) = trace.named("take over")
    assert taken_over.parent_id == trace.root.span_id
    assert taken_over.attributes["fleet.epoch"] == 2
    for service in ("denoising", "decoding"):
        # The killed worker may be called again until its heartbeat expires.
        (attempt,) = [each for each in trace.named(f"attempt {service}") if not each.error]
        trace.check_attempt(attempt, service)
        assert attempt.attributes.get("fleet.resumed_at_step", 0) > 0 or service == "decoding"
    known = {each.span_id for each in trace.spans} | {PARENT_ID}
    orphans = [each for each in trace.spans if each.parent_id not in known]
    assert not [each.name for each in orphans if each.name.split()[0] not in ("send", "receive", "serve", "wait")], (
        "a span outside the lost attempt has no parent"
    )


def test_request_is_one_trace_after_lost_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(HANG_SECONDS), served(FLUX) as fleet:
            await check_without_faults(fleet, receiver)
            await check_client_context(fleet, receiver)
            await fleet.repeat_if_late(partial(check_lost_worker, fleet, receiver))
            await fleet.repeat_if_late(partial(check_take_over, fleet, receiver))

    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        asyncio.run(scenario())
        assert receiver.spans
        assert not [each for each in receiver.spans if each.trace_id == "a" * 32]
        assert not [word for word in PROMPT_WORDS for raw in receiver.raw if word in raw]
