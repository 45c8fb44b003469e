"""A model with two variants in a real fleet. A request's images select the variant; workers serve both variants."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from async_tests import HANG_SECONDS
from common.artifacts import Prompt, Sampling
from common.codec import pack
from common.errors import InvalidInput
from common.rpc.client import RemoteRunner, open_channel
from common.stage import Call
from common.state.connection import connect as connect_store
from common.state.workers import WorkerRegistry
from fleet.v1 import generation_pb2 as pb
from fleet_parts import Parts, ended, run_parts, serve_text_before_image
from local_fleet import LocalFleet
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from served_fleet import ServedFleet, served_fleet
from services.cli.models import lines_of
from toy_checkpoint import build_twin_checkpoint, twin_family

TEXT_SERVICES = ("text_encoding", "latent_preparation", "denoising", "decoding")


def png(color: str) -> bytes:
    """A PNG of one color."""
    file = io.BytesIO()
    Image.new("RGB", (20, 12), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with twin_family(tmp_path_factory.mktemp("plugins")) as plugins:
        path = build_twin_checkpoint(tmp_path_factory.mktemp("models") / "twin")
        yield open_model(str(path), load_registry(plugins))


def take_loaded() -> list[str]:
    """Return and clear the list of modules that the twin family's loader has loaded in this process."""
    loaded: list[str] = vars(sys.modules["twin_config"])["LOADED"] if "twin_config" in sys.modules else []
    found = list(loaded)
    loaded.clear()
    return found


@pytest.fixture(scope="module")
def local(twin: ServedModel) -> Iterator[LocalFleet]:
    take_loaded()
    fleet = LocalFleet(twin)
    assert sorted(take_loaded()) == ["lens", "palette", "transformer"], "a module is not loaded exactly once"
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def fleet(twin: ServedModel, local: LocalFleet) -> Iterator[ServedFleet]:
    """Depends on `local` so that the two fixtures' module loads are counted separately."""
    assert local.model is twin
    with served_fleet([twin]) as fleet:
        assert sorted(take_loaded()) == ["lens", "palette", "transformer"], "a module is not loaded exactly once"
        yield fleet


@pytest.mark.parametrize(
    ("variant", "images", "steps"),
    [
        ("text", {}, 4),
        ("image", {"image": png("red")}, 6),
        ("image", {"image": png("red"), "image_1": png("blue")}, 6),
    ],
)
def test_images_select_the_variant(
    fleet: ServedFleet, local: LocalFleet, variant: str, images: dict[str, bytes], steps: int
) -> None:
    answer = fleet.generate("twin", images=images, prompt="a leaf", seed=3)
    assert answer.record.variant == variant
    assert answer.record.parameters.num_inference_steps == steps, "the variant's default is not used"
    expected = local.tensors(images=images, prompt="a leaf", seed=3)
    for name, tensor in answer.tensors.items():
        assert torch.equal(tensor, expected[name]), name


def test_variants_generate_different_images(fleet: ServedFleet) -> None:
    given = [{}, {"image": png("red")}, {"image": png("blue")}]
    drawn = [fleet.generate("twin", images=images, prompt="a leaf", seed=3, num_inference_steps=4) for images in given]
    pixels = [answer.tensors["pixels"] for answer in drawn]
    assert not torch.equal(pixels[0], pixels[1])
    assert not torch.equal(pixels[1], pixels[2])


@pytest.mark.parametrize(
    ("images", "field", "message"),
    [
        (
            {"mask": png("red")},
            "mask",
            "twin, which takes: text (no images), image (image, optional image_1)",
        ),
        (
            {"image_1": png("red")},
            "images",
            "image_1 is not a set of images of twin, which takes: text",
        ),
        (
            {"image": png("red"), "image_2": png("red")},
            "image_2",
            "image, image_2 is not a set of images of twin",
        ),
    ],
)
def test_images_that_fit_no_variant_are_refused(
    fleet: ServedFleet, images: dict[str, bytes], field: str, message: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        fleet.generate("twin", images=images, prompt="a leaf")
    assert caught.value.field == field
    assert message in caught.value.message


def test_request_accepts_only_the_parameters_of_its_variant(fleet: ServedFleet) -> None:
    with pytest.raises(InvalidInput, match="TwinPipeline has no parameter 'strength'"):
        fleet.generate("twin", prompt="a leaf", strength=2.0)
    answer = fleet.generate("twin", images={"image": png("red")}, prompt="a leaf", strength=2.0)
    assert answer.record.parameters.params["strength"].double_value == 2.0


def test_models_are_listed_with_their_variants(fleet: ServedFleet) -> None:
    (model,) = fleet.models()
    text, image = model.variants
    assert (text.name, list(text.services), list(text.required_images)) == ("text", list(TEXT_SERVICES), [])
    assert (image.name, list(image.required_images), list(image.optional_images)) == ("image", ["image"], ["image_1"])
    assert [each.service for each in model.services] == list(image.services)
    assert {"strength", "image"} <= {each.name for each in image.parameters} - {each.name for each in text.parameters}
    assert {each.name for each in model.parameters} == {each.name for each in image.parameters}
    lines = list(lines_of(model))
    assert "  variant text: no images; services text_encoding, latent_preparation, denoising, decoding" in lines
    first = lines.index(
        "  variant image: image, optional image_1; services text_encoding, image_encoding, latent_preparation, "
        "denoising, decoding"
    )
    assert lines[first + 1 :] == ["    num_inference_steps: int = 6  Steps of the denoising loop."]


def submission(images: dict[str, bytes]) -> pb.SubmitRequest:
    parameters = pb.GenerationParameters(
        prompt="a leaf", seed=3, images=[pb.ImageInput(role=role, data=data) for role, data in images.items()]
    )
    return pb.SubmitRequest(model="twin", parameters=parameters)


def test_variant_needs_only_the_workers_of_its_own_services(twin: ServedModel, tmp_path: Path) -> None:
    async def test(parts: Parts) -> None:
        await serve_text_before_image(parts, submission({}), submission({"image": png("red")}))

    run_parts(twin, tmp_path, test)


def test_taken_over_request_retains_its_variant(twin: ServedModel, tmp_path: Path) -> None:
    async def test(parts: Parts) -> None:
        first, stub = await parts.add_coordinator()
        records = [(await stub.Submit(submission(images))).request for images in ({"image": png("red")}, {})]
        assert [record.variant for record in records] == ["image", "text"]
        await first.stop(0)
        _, other = await parts.add_coordinator()
        for service in ("image_encoding", *TEXT_SERVICES):
            await parts.add_worker(service)
        for record in records:
            end = await ended(other, record.request_id)
            assert (end.state, end.variant) == (pb.REQUEST_STATE_SUCCEEDED, record.variant), end.error.message
            watch = other.Watch(pb.WatchRequest(request_id=record.request_id))
            steps = [each.event.progress.total_steps async for each in watch]
            assert max(steps) == {"image": 6, "text": 4}[record.variant]

    run_parts(twin, tmp_path, test)


def test_call_with_an_unknown_variant_is_refused(twin: ServedModel, tmp_path: Path) -> None:
    """A call without a variant uses the first variant, which requires initial_latents."""

    async def test(parts: Parts) -> None:
        address = await parts.add_worker("denoising")
        async with connect_store(parts.url) as redis:
            (info,) = await WorkerRegistry(redis).live("twin", "denoising")
        assert list(info.contract.stages) == ["DenoisingStage"]
        spec = twin.service("denoising")
        async with open_channel(address) as channel:
            runner = RemoteRunner(channel, "denoising", spec.contract)
            with pytest.raises(
                InvalidInput, match="'video' is not a variant that denoising serves; it serves text, image"
            ):
                await runner({}, Call("r", variant="video"))
            with pytest.raises(InvalidInput, match="initial_latents is missing"):
                await runner({}, Call("r"))

    run_parts(twin, tmp_path, test)


def test_reply_cache_separates_variants(twin: ServedModel, tmp_path: Path) -> None:
    """The second call of a variant is a cache hit without a begun frame. The other variant's first call is a miss."""

    async def test(parts: Parts) -> None:
        address = await parts.add_worker("text_encoding")
        begun: list[str] = []
        replies: list[bytes] = []
        async with open_channel(address) as channel:
            runner = RemoteRunner(channel, "text_encoding", twin.service("text_encoding").contract)
            for variant in ("text", "text", "image", "image"):
                sampling = Sampling(num_inference_steps=4, seed=1)
                values = {"prompt": pack("prompt", Prompt(prompt="red")), "sampling": pack("sampling", sampling)}
                outputs = await runner(values, Call("r", variant=variant, on_begun=partial(begun.append, variant)))
                replies.append(outputs["text_conditioning"].message.SerializeToString(deterministic=True))
        assert begun == ["text", "image"]
        assert replies[0] == replies[1] != replies[2] == replies[3]

    run_parts(twin, tmp_path, test)


def test_images_of_the_command_line_select_the_variant(tmp_path: Path) -> None:
    build_twin_checkpoint(tmp_path / "twin")
    (tmp_path / "red.png").write_bytes(png("red"))
    with twin_family(tmp_path / "plugins") as plugins:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}
        environment["FLEET_PLUGINS"] = ",".join(map(str, plugins))

        def generate(*flags: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "services.cli", "generate", "a leaf", "--model", "./twin", "--seed", "3"]
            return subprocess.run(
                [*command, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
            )

        for name, flags in {"text": (), "image": ("--image", "red.png")}.items():
            done = generate(*flags, "--output", f"{name}.png")
            assert done.returncode == 0, done.stderr
        refused = generate("--param", "mask_image=red.png", "--output", "x.png")
    assert (tmp_path / "text.png").read_bytes() != (tmp_path / "image.png").read_bytes()
    assert refused.returncode == 2
    assert "twin, which takes: text (no images), image (image, optional image_1)" in refused.stderr
    assert not (tmp_path / "x.png").exists()
