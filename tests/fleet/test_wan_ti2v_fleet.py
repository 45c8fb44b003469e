"""Wan 2.2 TI2V: one fleet serves both variants; outputs equal those of one process bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors.torch import load_file

from coarse_images import coarse_image, png
from common.errors import InvalidInput
from fleet.v1 import generation_pb2 as pb
from fleet_parts import Parts, run_parts, serve_text_before_image
from local_fleet import NO_IMAGES, LocalFleet
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from served_fleet import ServedFleet, served_fleet
from services.cli.__main__ import main
from services.denoising import __main__ as denoising
from services.denoising import launcher
from tiny_wan import build_tiny_wan_ti2v

GIVEN: dict[str, Any] = {"prompt": "a red apple", "height": 64, "width": 96, "num_frames": 5, "seed": 5}
STEPS = 3
IMAGE = png(coarse_image(90, 60))
IMAGES = {"text": NO_IMAGES, "image": {"image": IMAGE}}
TAKES = "ti2v, which takes: text (no images), image (image)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    torch.set_num_threads(1)
    return open_model(f"ti2v={build_tiny_wan_ti2v(tmp_path_factory.mktemp('wan') / 'ti2v')}", load_registry())


@pytest.fixture(scope="module")
def local(model: ServedModel) -> Iterator[LocalFleet]:
    fleet = LocalFleet(model)
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def fleet(model: ServedModel) -> Iterator[ServedFleet]:
    with served_fleet([model]) as served:
        yield served


@pytest.mark.parametrize("variant", IMAGES)
def test_tensors_equal_those_of_one_process(fleet: ServedFleet, local: LocalFleet, variant: str) -> None:
    given = {**GIVEN, "num_inference_steps": STEPS, "num_outputs_per_prompt": 2}
    answer = fleet.generate("ti2v", images=IMAGES[variant], **given)
    assert answer.record.variant == variant
    expected = local.tensors(images=IMAGES[variant], **given)
    assert answer.tensors.keys() == expected.keys() == {"latents", "pixels"}
    assert all(torch.equal(answer.tensors[name], expected[name]) for name in expected)


def test_text_request_needs_no_image_encoding_worker(model: ServedModel, tmp_path: Path) -> None:
    def submission(images: dict[str, bytes]) -> pb.SubmitRequest:
        sent = [pb.ImageInput(role=role, data=data) for role, data in images.items()]
        parameters = pb.GenerationParameters(num_inference_steps=STEPS, images=sent, **GIVEN)
        return pb.SubmitRequest(model="ti2v", parameters=parameters)

    async def test(parts: Parts) -> None:
        await serve_text_before_image(parts, submission({}), submission({"image": IMAGE}))

    run_parts(model, tmp_path, test)


def generate(fleet: ServedFleet, output: Path, *flags: str) -> int:
    """Run `fleet generate` at the fleet; returns its exit code."""
    given = ("--height", "64", "--width", "96", "--num-frames", "5", "--num-inference-steps", str(STEPS), "--seed", "5")
    return main(["generate", "a red apple", *given, *flags, "--output", str(output), "--endpoint", fleet.endpoint])


def test_the_command_line_sends_an_image(fleet: ServedFleet, local: LocalFleet, tmp_path: Path) -> None:
    (tmp_path / "boat.png").write_bytes(IMAGE)
    for variant, flags in (("text", ()), ("image", ("--image", str(tmp_path / "boat.png")))):
        assert generate(fleet, tmp_path / f"{variant}.safetensors", *flags) == 0
        expected = local.tensors(images=IMAGES[variant], num_inference_steps=STEPS, **GIVEN)
        assert torch.equal(load_file(tmp_path / f"{variant}.safetensors")["latents"], expected["latents"])
    assert generate(fleet, tmp_path / "boat.mp4", "--image", str(tmp_path / "boat.png")) == 0
    with av.open(str(tmp_path / "boat.mp4"), "r") as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, float(stream.average_rate or 0)) == (96, 64, 24.0)
        assert len(list(container.decode(stream))) == 5


def test_the_command_line_lists_both_variants(fleet: ServedFleet, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--endpoint", fleet.endpoint]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ti2v (WanPipeline), checkpoint ")
    common = "latent_preparation, denoising, decoding"
    assert [line for line in lines if "variant" in line] == [
        f"  variant text: no images; services text_encoding, {common}",
        f"  variant image: image; services text_encoding, image_encoding, {common}",
    ]


@pytest.mark.parametrize(
    ("roles", "field"), [(["last_image"], "last_image"), (["image", "last_image"], "last_image"), (["mask"], "mask")]
)
def test_images_that_fit_no_variant_are_refused(fleet: ServedFleet, roles: list[str], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        fleet.generate("ti2v", images=dict.fromkeys(roles, IMAGE), num_inference_steps=STEPS, **GIVEN)
    assert caught.value.message == f"images: {', '.join(roles)} is not a set of images of {TAKES}"
    assert caught.value.field == field


@pytest.mark.parametrize("variant", IMAGES)
def test_sizes_and_frames_are_rounded_with_a_warning(fleet: ServedFleet, variant: str) -> None:
    given = {**GIVEN, "height": 80, "width": 112, "num_frames": 7}
    answer = fleet.generate("ti2v", images=IMAGES[variant], num_inference_steps=1, **given)
    assert {(warning.field, warning.message) for warning in answer.warnings} == {
        ("num_frames", "7 is not one more than a multiple of 4; 5 is used instead"),
        ("height", "80 is not a multiple of 32; 64 is used instead"),
        ("width", "112 is not a multiple of 32; 96 is used instead"),
    }
    assert answer.tensors["pixels"].shape == (1, 5, 3, 64, 96)


def test_more_cfg_ranks_than_branches_are_refused_at_startup(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "launch", lambda *_: pytest.fail("a worker group was started"))
    model_flags = ("--model", f"ti2v={model.checkpoint.path}", "--redis", "unix:///x", "--cfg", "3")
    assert denoising.main([*model_flags, "--device", "cpu"]) == 2
    message = "cfg: 3 is not at most 2; WanPipeline has 2 branches: positive, negative"
    assert message in capsys.readouterr().err
    assert main(["up", *model_flags]) == 2
    assert message in capsys.readouterr().err
