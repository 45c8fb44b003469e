"""A family with other names of slots, roles and services runs on a real coordinator and real workers.

For costs, progress, resume, cancel and download, services use only the declarations of stages.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from async_tests import HANG_SECONDS
from common.artifacts import ParamValue
from common.stage import Call
from coordinator_fleet import FakeFleet, Stub, running_fleet, terminal
from fleet.v1 import generation_pb2 as pb
from local_fleet import NO_IMAGES, LocalFleet
from models import contracts
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from models.validation import InputValidationStage
from services.coordinator.costs import costs_of
from services.worker import Worker, start_worker
from services.worker_settings import LoopSettings
from toy_checkpoint import build_toy_checkpoint, copy_renamed_family, toy_family

STEPS = 5
STOPPED_AT = 2
PAINTING = "toy_painting"
GIVEN: dict[str, ParamValue] = {"prompt": "red", "seed": 3, "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with toy_family(tmp_path_factory.mktemp("renamed") / "plugins", copy_renamed_family) as plugins:
        path = build_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy", pipeline="RenamedToyPipeline")
        yield open_model(f"renamed={path}", load_registry([plugins]))


@dataclass
class Loop:
    """Records calls of the family's denoising loop, and stops it after step STOPPED_AT if `stops` is set."""

    stops: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    starts: list[int] = field(default_factory=list)

    def watch(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the loop's run()."""

        def watched(stage: object, x: contracts.DenoisingInput, call: Call) -> Any:
            self.starts.append(0 if x.resume_from is None else x.resume_from.step)

            def on_progress(step: int, total_steps: int) -> None:
                call.on_progress(step, total_steps)
                if step == STOPPED_AT and self.stops.is_set():
                    assert call.cancelled.wait(HANG_SECONDS)
                    self.cancelled.set()
                    call.check_cancelled()

            return run(stage, x, replace(call, on_progress=on_progress))

        return watched


@dataclass
class Running:
    """A coordinator, and a worker of each service; workers send a step checkpoint after every step."""

    fleet: FakeFleet
    stub: Stub
    workers: dict[str, Worker]
    loop: Loop
    add_worker: Callable[[str], Awaitable[None]]

    async def submit(self) -> str:
        """Submit the request; returns its id."""
        parameters = pb.GenerationParameters(prompt="red", seed=3, num_inference_steps=STEPS)
        return (await self.stub.Submit(pb.SubmitRequest(parameters=parameters))).request.request_id

    async def wait_stopped(self, request_id: str) -> None:
        """Wait until the loop has reported step STOPPED_AT, where it stops."""
        async for reply in self.stub.Watch(pb.WatchRequest(request_id=request_id)):
            progress = reply.event.progress
            if (progress.service, progress.step) == (PAINTING, STOPPED_AT):
                return


def run_on_family(
    url: str, model: ServedModel, monkeypatch: pytest.MonkeyPatch, test: Callable[[Running], Awaitable[None]]
) -> None:
    """Run a test with a real coordinator and real workers of the family."""

    async def main() -> None:
        async with asyncio.timeout(HANG_SECONDS), running_fleet(url, model) as fleet, AsyncExitStack() as stack:
            workers: dict[str, Worker] = {}

            async def add_worker(service: str) -> None:
                settings = LoopSettings(
                    model=model.name,
                    redis=url,
                    listen=f"unix:{fleet.directory}/{secrets.token_hex(4)}.sock",
                    device="cpu",
                    threads=1,
                    step_checkpoint_every=1,
                    step_seconds=0,
                )
                workers[service] = await start_worker(service, model, settings)

            async def stop_workers() -> None:
                for worker in workers.values():
                    await worker.stop(0)

            stack.push_async_callback(stop_workers)
            for spec in model.services:
                await add_worker(spec.service)
            loop = Loop()
            toy_stage = vars(sys.modules["toy_stages"])["ToyDenoisingStage"]
            monkeypatch.setattr(toy_stage, "run", loop.watch(toy_stage.run))
            _, stub = await fleet.add_coordinator(step_seconds=0)
            await test(Running(fleet, stub, workers, loop, add_worker))

    asyncio.run(main())


async def result_of(stub: Stub, request_id: str) -> bytes:
    """The only file of a request's result."""
    download = stub.DownloadResult(pb.DownloadResultRequest(request_id=request_id))
    return b"".join([reply.data async for reply in download])


@pytest.fixture(scope="module")
def expected_file(model: ServedModel) -> bytes:
    """The file of the same request, computed by stages in this process."""
    alone = LocalFleet(model)
    (item,) = alone.media(None, NO_IMAGES, **GIVEN).items
    alone.close()
    return item.data.numpy().tobytes()


def test_no_name_of_the_family_is_standard(model: ServedModel) -> None:
    standard = {
        slot
        for contract in (
            contracts.IMAGE_TEXT_ENCODING,
            contracts.IMAGE_ENCODING,
            contracts.IMAGE_VAE_ENCODING,
            contracts.LATENT_PREPARATION,
            contracts.TIMESTEP_PREPARATION,
            contracts.DENOISING,
            contracts.DECODING,
        )
        for slot in (*contract.inputs, *contract.outputs)
    }
    stages = [stage for service in model.services for stage in service.stages]
    slots = {slot for stage in stages for slot in (*stage.contract.inputs, *stage.contract.outputs)}
    assert {"sampling", "resume_from", "media"} <= standard
    assert len(slots) == 9
    assert not standard & slots
    assert not {role for stage in stages for role in stage.modules} & {"transformer", "scheduler", "vae"}


def test_costs_follow_the_stages_declarations(model: ServedModel) -> None:
    params = InputValidationStage(model).run({**GIVEN, "height": 64, "width": 40, "num_outputs_per_prompt": 2}).params
    pixels = 64 * 40 * 2
    assert costs_of(model.services, params) == {
        "toy_reading": 1,
        "toy_mixing": pixels,
        "toy_painting": pixels * STEPS,
        "toy_framing": pixels,
    }


def test_every_service_reports_progress_and_the_file_equals_local_stages(
    store_url: str, model: ServedModel, expected_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(running: Running) -> None:
        request_id = await running.submit()
        events = await terminal(running.stub, request_id)
        assert events[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        progress: dict[str, list[tuple[int, int]]] = {}
        for event in events:
            if event.HasField("progress"):
                latest = event.progress
                progress.setdefault(latest.service, []).append((latest.step, latest.total_steps))
        painting = progress.pop(PAINTING)
        assert painting == sorted(painting)
        assert (painting[0], painting[-1]) == ((0, STEPS), (STEPS, STEPS))
        assert progress == {name: [(0, 1), (1, 1)] for name in ("toy_reading", "toy_mixing", "toy_framing")}
        assert await result_of(running.stub, request_id) == expected_file

    run_on_family(store_url, model, monkeypatch, test)


def test_cancelled_request_stops_within_a_step(
    store_url: str, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(running: Running) -> None:
        running.loop.stops.set()
        request_id = await running.submit()
        await running.wait_stopped(request_id)
        await running.stub.CancelRequest(pb.CancelRequestRequest(request_id=request_id))
        assert (await terminal(running.stub, request_id))[-1].state_change.state == pb.REQUEST_STATE_CANCELLED
        assert await asyncio.to_thread(running.loop.cancelled.wait, 30)
        record = (await running.stub.GetRequest(pb.GetRequestRequest(request_id=request_id))).request
        assert record.steps_saved == STEPS - STOPPED_AT

    run_on_family(store_url, model, monkeypatch, test)


def test_another_worker_resumes_from_a_step_checkpoint(
    store_url: str, model: ServedModel, expected_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(running: Running) -> None:
        running.loop.stops.set()
        request_id = await running.submit()
        await running.wait_stopped(request_id)
        running.loop.stops.clear()
        await running.workers.pop(PAINTING).stop(0)
        await running.add_worker(PAINTING)
        assert (await terminal(running.stub, request_id))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        first, second = running.loop.starts
        assert first == 0
        assert second in range(1, STOPPED_AT + 1)
        assert await result_of(running.stub, request_id) == expected_file

    run_on_family(store_url, model, monkeypatch, test)
