"""Log lines of a fleet: one line per state of a request, with ids, and with prompts only if enabled."""

from __future__ import annotations

import io
import json
from asyncio.subprocess import Process
from collections import Counter
from typing import Any

import pytest
import torch

from async_tests import wait_until
from common.artifacts import StepCheckpoint
from common.errors import HandedOver, InvalidInput
from common.logs import get_logger, setup_logging
from common.rpc.client import open_channel
from common.stage import Call
from coordinator_fleet import (
    SERVICES,
    FakeFleet,
    Gate,
    Script,
    Stub,
    latents_of,
    run_on_fleet,
    submission,
    submit_expiring,
    terminal,
)
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from late_faults import FaultTooLate, longer_each_time

OTHER_SERVICES = ("text_encoding", "latent_preparation", "decoding")
CANARY = "a canary on a branch"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
METADATA = (("traceparent", f"00-{TRACE_ID}-00f067aa0ba902b7-01"),)

_log = get_logger("services.test")


class Lines:
    """Log records of this process at DEBUG."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        setup_logging("fleet", level="DEBUG", form="json", stream=self._stream)

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    def states(self, name: str) -> list[str]:
        """Logged states and other events of a request, in the order of their lines."""
        return changes(self.all(), name)


def changes(lines: list[dict[str, Any]], name: str) -> list[str]:
    """State of each line about a request, or its event if it has no state."""
    own = [line for line in lines if line.get("request_id") == name and line["event"].startswith("request ")]
    assert {line["level"] for line in own} <= {"INFO"}
    assert {line["model"] for line in own} <= {"emoji"}
    return [line.get("state", line["event"]) for line in own]


@pytest.fixture
def lines() -> Lines:
    return Lines()


async def submitted(stub: Stub, **fields: Any) -> str:
    return (await stub.Submit(submission(CANARY, **fields), metadata=METADATA)).request.request_id


def test_each_state_of_a_request_is_logged_once(store_url: str, lines: Lines) -> None:
    """Two coordinators run four requests concurrently; a replayed submission is not logged."""

    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        await fleet.add_workers()
        stubs = [(await fleet.add_coordinator())[1] for _ in range(2)]
        names = [await submitted(stubs[number % 2], idempotency_key=str(number)) for number in range(4)]
        assert await submitted(stubs[1], idempotency_key="0") == names[0]
        for name in names:
            await terminal(stubs[0], name)

        async def all_ended() -> bool:
            return all(lines.states(name)[-1:] == ["SUCCEEDED"] for name in names)

        await wait_until(all_ended)
        assert [lines.states(name) for name in names] == [["QUEUED", "RUNNING", "SUCCEEDED"]] * 4

    run_on_fleet(store_url, scenario)
    state_lines = [line for line in lines.all() if "state" in line]
    assert Counter(line["event"] for line in state_lines) == {
        "request accepted": 4,
        "request running": 4,
        "request finished": 4,
    }
    assert {line["trace_id"] for line in state_lines} == {TRACE_ID}
    assert all(line["seconds"] > 0 for line in state_lines if line["event"] == "request finished")


def test_failure_cancellation_and_expiry_are_logged_once(store_url: str, lines: Lines) -> None:
    seconds = longer_each_time(1.0)

    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()

        def fail(_: Call) -> None:
            raise ZeroDivisionError("a defect")

        await fleet.add_workers(("text_encoding", "latent_preparation", "denoising"))
        await fleet.add_worker("decoding", Script(fleet.scripts["decoding"].contract, fail))
        _, stub = await fleet.add_coordinator()
        failed = await submitted(stub)
        await terminal(stub, failed)
        fleet.scripts["denoising"].work = gate
        cancelled = await submitted(stub)
        await gate.wait_reached()
        await stub.CancelRequest(pb.CancelRequestRequest(request_id=cancelled))
        await terminal(stub, cancelled)
        expired = await submit_expiring(stub, submission(CANARY), next(seconds))
        stored = [event.state_change.state for event in await terminal(stub, expired)]
        if pb.REQUEST_STATE_RUNNING not in stored:
            raise FaultTooLate("the request expired before it ran")
        for name, end in ((failed, "FAILED"), (cancelled, "CANCELLED"), (expired, "EXPIRED")):

            async def has_ended(name: str = name, end: str = end) -> bool:
                return lines.states(name)[-1:] == [end]

            await wait_until(has_ended)
            assert lines.states(name) == ["QUEUED", "RUNNING", end]
        (line,) = [line for line in lines.all() if line.get("state") == "FAILED" and line["request_id"] == failed]
        assert (line["code"], line["error"]) == ("INTERNAL", "ZeroDivisionError: a defect")

    run_on_fleet(store_url, scenario)


def test_request_that_never_ran_has_no_running_line(store_url: str, lines: Lines) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        _, stub = await fleet.add_coordinator()
        name = await submitted(stub)
        await stub.CancelRequest(pb.CancelRequestRequest(request_id=name))
        await terminal(stub, name)

        async def has_ended() -> bool:
            return lines.states(name) == ["QUEUED", "CANCELLED"]

        await wait_until(has_ended)

    run_on_fleet(store_url, scenario)


async def _lines_until_running(process: Process) -> list[dict[str, Any]]:
    """Lines up to the first line with the state RUNNING, which is written after the store is updated."""
    assert process.stderr is not None
    read: list[dict[str, Any]] = []
    while not read or read[-1].get("state") != "RUNNING":
        line = await process.stderr.readline()
        assert line, "the coordinator exited"
        read.append(json.loads(line))
    return read


async def _remaining_lines(process: Process) -> list[dict[str, Any]]:
    assert process.stderr is not None
    return [json.loads(line) for line in (await process.stderr.read()).splitlines()]


def test_states_of_a_taken_over_request_are_logged_once(store_url: str, lines: Lines) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        listen = f"unix:{fleet.directory}/c.sock"
        process = await fleet.start_process(listen, "--log-level", "INFO", "--log-format", "json")
        async with open_channel(listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            name = await submitted(stub)
            await gate.wait_reached()
            first_lines = await _lines_until_running(process)
        process.kill()
        _, other = await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)

        async def is_taken_over() -> bool:
            return bool(lines.states(name))

        await wait_until(is_taken_over)
        gate.opened.set()
        await terminal(other, name)

        async def has_ended() -> bool:
            return lines.states(name)[-1:] == ["SUCCEEDED"]

        await wait_until(has_ended)
        assert changes([*first_lines, *await _remaining_lines(process)], name) == ["QUEUED", "RUNNING"]
        assert lines.states(name) == ["request taken over", "SUCCEEDED"]
        (taken,) = [line for line in lines.all() if line["event"] == "request taken over"]
        assert (taken["epoch"], taken["trace_id"]) == (2, TRACE_ID)

    run_on_fleet(store_url, scenario)


def test_failed_take_over_is_logged_once(store_url: str, lines: Lines) -> None:
    """The request has a raw result, which only the killed coordinator could have delivered."""

    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        listen = f"unix:{fleet.directory}/c.sock"
        process = await fleet.start_process(listen)
        async with open_channel(listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request = submission(CANARY)
            request.parameters.output_format = pb.OUTPUT_FORMAT_SAFETENSORS
            replies = aiter(stub.Generate(pb.GenerateRequest(request=request), metadata=METADATA))
            name = (await anext(replies)).accepted.request_id
            await gate.wait_reached()
            process.kill()
            await process.wait()
        await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)

        async def has_ended() -> bool:
            return lines.states(name)[-1:] == ["FAILED"]

        await wait_until(has_ended)
        assert lines.states(name) == ["request taken over", "FAILED"]
        assert {line["trace_id"] for line in lines.all() if line.get("request_id") == name} == {TRACE_ID}

    run_on_fleet(store_url, scenario)


class HandsOver:
    """A loop whose first call sends a step checkpoint and hands over. Its second call succeeds."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, call: Call) -> None:
        self.calls += 1
        if self.calls == 1:
            call.checkpoint(StepCheckpoint(step=3, latents=latents_of(torch.zeros(1, 4))))
            raise HandedOver("handed over after 3 steps")


def test_resume_is_logged_with_step_stage_and_attempt(store_url: str, lines: Lines) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers(OTHER_SERVICES)
        script = Script(fleet.scripts["denoising"].contract, HandsOver())
        for _ in range(2):
            await fleet.add_worker("denoising", script, numerics="abc123")
        _, stub = await fleet.add_coordinator()
        name = await submitted(stub)
        await terminal(stub, name)

        async def has_ended() -> bool:
            return lines.states(name)[-1:] == ["SUCCEEDED"]

        await wait_until(has_ended)
        assert lines.states(name) == ["QUEUED", "RUNNING", "request resumed", "SUCCEEDED"]

    run_on_fleet(store_url, scenario)
    (line,) = [line for line in lines.all() if line["event"] == "request resumed"]
    assert (line["step"], line["stage"], line["attempt"]) == (3, "denoising", 2)
    (line,) = [line for line in lines.all() if line["event"] == "attempt handed over"]
    assert (line["stage"], line["attempt"]) == ("denoising", 1)


def test_lines_of_interleaved_requests_have_their_own_request_id(store_url: str, lines: Lines) -> None:
    """Workers log on the device thread and, if a call fails, on the event loop."""

    async def scenario(fleet: FakeFleet) -> None:
        names: list[str] = []

        def work(call: Call) -> None:
            _log.info("stage works", of=call.request_id)
            if names.index(call.request_id) % 2:
                raise ZeroDivisionError(call.request_id)

        for _ in range(2):
            for service in SERVICES:
                contract = fleet.scripts[service].contract
                await fleet.add_worker(service, Script(contract, work) if service == "decoding" else None, capacity=2)
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        _, stub = await fleet.add_coordinator()
        names.extend([await submitted(stub) for _ in range(4)])
        await gate.wait_reached()
        gate.opened.set()
        for name in names:
            await terminal(stub, name)

    run_on_fleet(store_url, scenario)
    works = [line for line in lines.all() if line["event"] == "stage works"]
    assert len(works) == 4
    for line in works:
        assert line["request_id"] == line["of"]
        assert (line["trace_id"], line["model"], line["stage"]) == (TRACE_ID, "emoji", "decoding")
        assert line["attempt"] == 1
    failed = [line for line in lines.all() if line["event"] == "call failed with an unexpected exception"]
    assert len(failed) == 2
    for line in failed:
        assert line["exception"].endswith(f"ZeroDivisionError: {line['request_id']}")
    attempts = [line for line in lines.all() if line["event"] == "attempt started"]
    assert Counter(line["stage"] for line in attempts) == dict.fromkeys(SERVICES, 4)
    unrelated = [line for line in lines.all() if line["event"] == "coordinator announced in the request store"]
    assert "request_id" not in unrelated[0]


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompt_is_logged_only_at_acceptance_and_only_if_enabled(
    store_url: str, lines: Lines, *, log_prompts: bool
) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator(log_prompts=log_prompts)
        request = submission(CANARY)
        request.parameters.negative_prompt = f"not {CANARY}"
        request.parameters.true_cfg_scale = 2.0
        name = (await stub.Submit(request)).request.request_id
        await terminal(stub, name)

    run_on_fleet(store_url, scenario)
    (accepted,) = [line for line in lines.all() if line["event"] == "request accepted"]
    if log_prompts:
        assert (accepted["prompt"], accepted["negative_prompt"]) == (CANARY, f"not {CANARY}")
        assert lines.text.count("canary") == 2
    else:
        assert "prompt" not in accepted
        assert "canary" not in lines.text


@pytest.mark.parametrize("kind", [ValueError, InvalidInput])
def test_prompt_in_an_error_is_redacted(store_url: str, lines: Lines, kind: type[Exception]) -> None:
    """Input errors may quote a part of the prompt. Messages and tracebacks of defects may quote all of it."""

    async def scenario(fleet: FakeFleet) -> None:
        def quote(_: Call) -> None:
            raise kind(f"cannot read {CANARY}" if kind is ValueError else f"cannot read {CANARY[2:]}")

        await fleet.add_workers(("latent_preparation", "denoising", "decoding"))
        await fleet.add_worker("text_encoding", Script(fleet.scripts["text_encoding"].contract, quote))
        _, stub = await fleet.add_coordinator()
        await terminal(stub, await submitted(stub))

    run_on_fleet(store_url, scenario)
    (line,) = [line for line in lines.all() if line.get("state") == "FAILED"]
    assert line["code"] == ("INTERNAL" if kind is ValueError else "INVALID_ARGUMENT")
    if kind is ValueError:
        assert line["error"] == "ValueError: cannot read [hidden]"
        (failed,) = [line for line in lines.all() if line["event"] == "call failed with an unexpected exception"]
        assert failed["exception"].endswith("ValueError: cannot read [hidden]")
    assert "canary" not in lines.text


def test_request_id_sent_by_a_client_is_not_logged(store_url: str, lines: Lines) -> None:
    """Workers read request ids from the metadata of coordinators. Coordinators ignore request ids of clients."""

    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        reply = await stub.Submit(submission(), metadata=(("fleet-request-id", "forged"), ("fleet-attempt", "7")))
        await terminal(stub, reply.request.request_id)

    run_on_fleet(store_url, scenario)
    assert "forged" not in lines.text
    assert '"attempt": 7' not in lines.text
