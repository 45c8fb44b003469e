"""GLM-Image, a hybrid pipeline, through real services: equal tensors, progress, cancel and recovery."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coarse_images import coarse_image, png
from common.errors import InvalidInput
from coordinator_fleet import Stub
from fleet.v1 import generation_pb2 as pb
from fleet_parts import Parts, ended, run_parts
from late_faults import FaultTooLate, repeat_if_late
from local_fleet import LocalFleet
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from served_fleet import ServedFleet, served_fleet
from services import stage_services
from services.cli.__main__ import main
from services.worker import Worker, start_worker
from services.worker_settings import WarmUpSettings
from tiny_glm_image import build_tiny_glm_image

SERVICES = ("before_denoising", "denoising", "decoding")
STEPS = 3
GIVEN: dict[str, Any] = {"prompt": "a red car with 'old stone' on it", "height": 64, "width": 96, "seed": 5}
CASES: dict[str, dict[str, Any]] = {
    "guided": {},
    "without guidance": {"guidance_scale": 1.0},
    "two outputs": {"num_outputs_per_prompt": 2, "prompt": "a cat"},
}
# 256 preview tokens and 400 image tokens.
LARGE: dict[str, Any] = {**GIVEN, "height": 640, "width": 640}
LARGE_TOKENS = 256 + 20 * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    torch.set_num_threads(1)
    return open_model(f"glm={build_tiny_glm_image(tmp_path_factory.mktemp('glm') / 'image')}", load_registry())


@pytest.fixture(scope="module")
def local(model: ServedModel) -> Iterator[LocalFleet]:
    fleet = LocalFleet(model)
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def fleet(model: ServedModel) -> Iterator[ServedFleet]:
    with served_fleet([model]) as served:
        yield served


def test_the_model_has_three_services(model: ServedModel) -> None:
    assert tuple(spec.service for spec in model.services) == SERVICES


@pytest.mark.parametrize("case", CASES)
def test_tensors_equal_those_of_one_process(fleet: ServedFleet, local: LocalFleet, case: str) -> None:
    given = {**GIVEN, "num_inference_steps": STEPS, **CASES[case]}
    got, expected = fleet.generate("glm", **given).tensors, local.tensors(**given)
    assert got.keys() == expected.keys() == {"latents", "pixels"}
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_command_line_generates_an_image(fleet: ServedFleet, local: LocalFleet, tmp_path: Path) -> None:
    flags = ("--height", "64", "--width", "96", "--num-inference-steps", str(STEPS), "--seed", "5")
    output = tmp_path / "car.safetensors"
    assert main(["generate", GIVEN["prompt"], *flags, "--output", str(output), "--endpoint", fleet.endpoint]) == 0
    assert torch.equal(load_file(output)["pixels"], local.tensors(**GIVEN, num_inference_steps=STEPS)["pixels"])


def test_the_command_line_lists_the_services_of_the_model(
    fleet: ServedFleet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "--endpoint", fleet.endpoint]) == 0
    assert capsys.readouterr().out.startswith("glm (GlmImagePipeline), checkpoint ")
    assert main(["status", "--endpoint", fleet.endpoint]) == 0
    status = capsys.readouterr().out
    assert all(service in status for service in SERVICES)
    assert "text_encoding" not in status


@pytest.mark.parametrize(
    ("change", "roles", "field", "message"),
    [
        ({"height": 80}, (), "height", "height: 80 is not a multiple of 32; 64 or 96 works"),
        ({"width": 16}, (), "width", "width: 16 is not a multiple of 32; 32 works"),
        ({}, ("image",), "images", "images: 1 is not 0; glm (GlmImagePipeline) takes no images"),
        ({}, ("image", "image_1", "image_2"), "images", "images: 3 is not 0; glm (GlmImagePipeline) takes no images"),
    ],
)
def test_invalid_input_is_refused_before_execution(
    fleet: ServedFleet, change: dict[str, Any], roles: tuple[str, ...], field: str, message: str
) -> None:
    images = dict.fromkeys(roles, png(coarse_image(40, 30)))
    with pytest.raises(InvalidInput) as caught:
        fleet.generate("glm", images=images, num_inference_steps=STEPS, **GIVEN | change)
    assert (caught.value.field, caught.value.message) == (field, message)


def submission(**given: Any) -> pb.SubmitRequest:
    return pb.SubmitRequest(model="glm", parameters=pb.GenerationParameters(num_inference_steps=STEPS, **given))


@asynccontextmanager
async def own_worker(parts: Parts) -> AsyncIterator[Worker]:
    """Run a worker of before_denoising in the block; it reports every token."""
    settings = WarmUpSettings(
        model="glm",
        redis=parts.url,
        listen=f"unix:{parts.directory}/own.sock",
        device="cpu",
        threads=1,
        step_seconds=0.0,
    )
    worker = await start_worker("before_denoising", parts.model, settings)
    try:
        yield worker
    finally:
        await worker.stop(0)


async def tokens(stub: Stub, request_id: str) -> AsyncGenerator[tuple[int, int], None]:
    """Step and total of each progress event of before_denoising."""
    async for reply in stub.Watch(pb.WatchRequest(request_id=request_id)):
        if reply.event.progress.service == "before_denoising":
            yield reply.event.progress.step, reply.event.progress.total_steps


async def wait_for_token(stub: Stub, request_id: str, token: int) -> None:
    """Wait until a worker has reported `token` tokens."""
    async with aclosing(tokens(stub, request_id)) as reported:
        async for step, _ in reported:
            if step >= token:
                return


def test_tokens_are_reported_and_cancel_stops_within_a_token(model: ServedModel, tmp_path: Path) -> None:
    async def test(parts: Parts) -> None:
        for service in SERVICES[1:]:
            await parts.add_worker(service)
        _, stub = await parts.add_coordinator(step_seconds=0.0)
        async with own_worker(parts):
            await repeat_if_late(partial(cancel, stub))
            await submit_another(stub)

    async def cancel(stub: Stub) -> None:
        cancelled = (await stub.Submit(submission(**LARGE))).request.request_id
        await wait_for_token(stub, cancelled, 3)
        await stub.CancelRequest(pb.CancelRequestRequest(request_id=cancelled))
        record = await ended(stub, cancelled)
        reported = [each async for each in tokens(stub, cancelled)]
        if record.state == pb.REQUEST_STATE_SUCCEEDED or reported[-1][0] == LARGE_TOKENS:
            raise FaultTooLate("the language model sampled all tokens")
        assert (record.state, record.steps_saved) == (pb.REQUEST_STATE_CANCELLED, STEPS)
        assert reported[0] == (0, 1)
        assert {total for _, total in reported[1:]} == {LARGE_TOKENS}

    async def submit_another(stub: Stub) -> None:
        completed = (await stub.Submit(submission(**GIVEN))).request.request_id
        assert (await ended(stub, completed)).state == pb.REQUEST_STATE_SUCCEEDED
        steps = [step for step, _ in [each async for each in tokens(stub, completed)]]
        assert steps == sorted(steps)
        assert 200 < steps[-1] <= 256 + 2 * 3, "the last reported token is not close to the last token"

    run_parts(model, tmp_path, test)


def test_request_of_a_stopped_worker_restarts_on_another_worker(
    model: ServedModel, local: LocalFleet, tmp_path: Path
) -> None:
    """The tokens are sampled again, with equal values from the same seed."""
    (item,) = local.media(num_inference_steps=1, output_format="png", **LARGE).items

    async def test(parts: Parts) -> None:
        for service in SERVICES[1:]:
            await parts.add_worker(service)
        _, stub = await parts.add_coordinator(step_seconds=0.0)
        parameters = pb.GenerationParameters(num_inference_steps=1, **LARGE)
        request = pb.SubmitRequest(model="glm", parameters=parameters)
        async with own_worker(parts):
            name = (await stub.Submit(request)).request.request_id
            await wait_for_token(stub, name, 3)
        await parts.add_worker("before_denoising")
        record = await ended(stub, name)
        assert record.state == pb.REQUEST_STATE_SUCCEEDED, record.error.message
        file = b"".join(
            [part.data async for part in stub.DownloadResult(pb.DownloadResultRequest(request_id=name, index=0))]
        )
        assert file == item.data.numpy().tobytes()

    run_parts(model, tmp_path, test)


def test_before_denoising_service_refuses_a_modular_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert stage_services.main("before_denoising", ["--model", "emoji", "--redis", "unix:///x", "--device", "cpu"]) == 2
    message = "FluxPipeline has no before_denoising service; it has text_encoding, latent_preparation, denoising"
    assert message in capsys.readouterr().err
