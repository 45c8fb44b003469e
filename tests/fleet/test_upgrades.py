"""A coordinator with workers of other releases: contracts, and reports of incompatible workers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from common.stage import Contract
from coordinator_fleet import SERVICES, FakeFleet, Script, emoji, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb
from services.cli.incompatible import HEAD, incompatible_rows
from services.cli.status_cells import table

SUCCEEDED, FAILED = pb.REQUEST_STATE_SUCCEEDED, pb.REQUEST_STATE_FAILED
CONTRACT: Contract = emoji().service("denoising").contract
NEWER_CONTRACT = replace(CONTRACT, inputs={**CONTRACT.inputs, "image_conditioning": "Conditioning"})
"""The contract of a newer release, with an input that this coordinator does not supply."""
REASON = "input 'image_conditioning': the worker requires Conditioning, the coordinator supplies none"
OTHERS = tuple(service for service in SERVICES if service != "denoising")


def without(slot: str) -> Contract:
    """The contract of a release that does not read a slot."""
    return replace(CONTRACT, inputs={name: kind for name, kind in CONTRACT.inputs.items() if name != slot})


def test_unread_inputs_are_not_sent(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers(OTHERS)
        script = Script(without("sampling"))
        await fleet.add_worker("denoising", script)
        _, stub = await fleet.add_coordinator()
        accepted = await stub.Submit(submission())
        events = await terminal(stub, accepted.request.request_id)
        assert events[-1].state_change.state == SUCCEEDED, events[-1]
        assert script.received == [frozenset({"initial_latents", "schedule", "text_conditioning"})]

    run_on_fleet(store_url, scenario)


def test_worker_without_the_resume_slot_gets_no_step_checkpoint(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers(OTHERS)
        script = Script(replace(without("resume_from"), optional=frozenset()))
        await fleet.add_worker("denoising", script, numerics="n")
        _, stub = await fleet.add_coordinator()
        accepted = await stub.Submit(submission())
        assert (await terminal(stub, accepted.request.request_id))[-1].state_change.state == SUCCEEDED
        assert script.received == [frozenset({"initial_latents", "schedule", "text_conditioning", "sampling"})]

    run_on_fleet(store_url, scenario)


def test_unread_output_is_dropped(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers(OTHERS)
        outputs = {**CONTRACT.outputs, "denoising_generator": "Generator"}
        await fleet.add_worker("denoising", Script(replace(CONTRACT, outputs=outputs)))
        _, stub = await fleet.add_coordinator()
        accepted = await stub.Submit(submission())
        events = await terminal(stub, accepted.request.request_id)
        assert events[-1].state_change.state == SUCCEEDED, events[-1]
        assert fleet.scripts["decoding"].received == [frozenset({"denoised_latents", "canvas"})]

    run_on_fleet(store_url, scenario)


def test_incompatible_worker_is_listed_and_gets_no_requests(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers(OTHERS)
        newer_script, equal_script = Script(NEWER_CONTRACT), Script(CONTRACT)
        newer_worker = await fleet.add_worker("denoising", newer_script, capacity=4)
        await fleet.add_worker("denoising", equal_script)
        _, stub = await fleet.add_coordinator()
        accepted = [await stub.Submit(submission(f"apple {number}")) for number in range(6)]
        ends = await asyncio.gather(*(terminal(stub, each.request.request_id) for each in accepted))
        assert [events[-1].state_change.state for events in ends] == [SUCCEEDED] * 6
        assert (len(equal_script.calls), newer_script.calls) == (6, [])
        overview = await stub.ListModels(pb.ListModelsRequest())
        (status,) = [each for each in overview.models[0].services if each.service == "denoising"]
        (shown,) = status.incompatible_workers
        assert (shown.worker_id, shown.variant, shown.reason) == (newer_worker.info.worker_id, "", REASON)
        assert (status.workers, status.capacity) == (1, 1)
        assert incompatible_rows(overview) == [("emoji", "denoising", "-", newer_worker.info.worker_id, REASON)]
        head, row = table(HEAD, incompatible_rows(overview)).splitlines()
        assert head.split() == ["MODEL", "SERVICE", "VARIANT", "INCOMPATIBLE", "WORKER", "REASON"]
        assert row.endswith(REASON)

    run_on_fleet(store_url, scenario)


def test_request_without_compatible_workers_reports_worker_and_slot(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers(OTHERS)
        script = Script(NEWER_CONTRACT)
        newer_worker = await fleet.add_worker("denoising", script)
        _, stub = await fleet.add_coordinator(worker_wait_seconds=0.3)
        accepted = await stub.Submit(submission())
        events = await terminal(stub, accepted.request.request_id)
        assert events[-1].state_change.state == FAILED
        record = (await stub.GetRequest(pb.GetRequestRequest(request_id=accepted.request.request_id))).request
        worker_and_reason = f"worker {newer_worker.info.worker_id}, {REASON}"
        assert record.error.code == "UNAVAILABLE"
        assert "no worker of emoji/denoising has been able to run the request for 0.3 s" in record.error.message
        assert worker_and_reason in record.error.message
        warnings = [event.warning.message for event in events if event.HasField("warning")]
        assert warnings == [f"no worker of denoising can serve the request ({worker_and_reason}); the request waits"]
        assert not script.calls

    run_on_fleet(store_url, scenario)


def test_request_waits_for_a_compatible_worker(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers(OTHERS)
        newer_script, equal_script = Script(NEWER_CONTRACT), Script(CONTRACT)
        await fleet.add_worker("denoising", newer_script)
        _, stub = await fleet.add_coordinator()
        accepted = await stub.Submit(submission())
        await asyncio.sleep(0.3)
        await fleet.add_worker("denoising", equal_script)
        assert (await terminal(stub, accepted.request.request_id))[-1].state_change.state == SUCCEEDED
        assert (len(equal_script.calls), newer_script.calls) == (1, [])

    run_on_fleet(store_url, scenario)
