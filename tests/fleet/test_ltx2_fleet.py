"""LTX-2: outputs of real services equal those of one process bit for bit. Some requests have an image."""

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
from local_fleet import NO_IMAGES, LocalFleet
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from mp4_sound import decoded_sound
from served_fleet import ServedFleet, served_fleet
from services.cli.__main__ import main
from services.denoising import __main__ as denoising
from services.denoising import launcher
from tiny_ltx2 import build_tiny_ltx2

STEPS = 3
GIVEN: dict[str, Any] = {"prompt": "a red apple", "height": 64, "width": 96, "num_frames": 9, "seed": 5}
PARAMS: dict[str, Any] = {"spatio_temporal_guidance_blocks": (1.0,), "max_sequence_length": 32}
IMAGE = png(coarse_image(90, 60))
IMAGES = {"text": NO_IMAGES, "image": {"image": IMAGE}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    torch.set_num_threads(1)
    return open_model(f"ltx2={build_tiny_ltx2(tmp_path_factory.mktemp('ltx2') / 'ltx2')}", load_registry())


@pytest.fixture(scope="module")
def local(model: ServedModel) -> Iterator[LocalFleet]:
    fleet = LocalFleet(model)
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def fleet(model: ServedModel) -> Iterator[ServedFleet]:
    with served_fleet([model]) as served:
        yield served


def generate(fleet: ServedFleet, output: Path, *flags: str) -> int:
    """Run `fleet generate` with the fleet's endpoint; returns its exit code."""
    given = ("--height", "64", "--width", "96", "--num-frames", "9", "--num-inference-steps", str(STEPS), "--seed", "5")
    params = ("--param", "spatio_temporal_guidance_blocks=[1]", "--param", "max_sequence_length=32")
    arguments = ["generate", "a red apple", *given, *params, *flags]
    return main([*arguments, "--output", str(output), "--endpoint", fleet.endpoint])


@pytest.mark.parametrize("variant", IMAGES)
def test_tensors_equal_those_of_one_process(
    fleet: ServedFleet, local: LocalFleet, tmp_path: Path, variant: str
) -> None:
    (tmp_path / "boat.png").write_bytes(IMAGE)
    flags = ("--image", str(tmp_path / "boat.png")) if variant == "image" else ()
    assert generate(fleet, tmp_path / "output.safetensors", *flags, "--num-outputs", "2") == 0
    got = load_file(tmp_path / "output.safetensors")
    given = {**GIVEN, **PARAMS, "num_inference_steps": STEPS, "num_outputs_per_prompt": 2}
    expected = local.tensors(images=IMAGES[variant], **given)
    assert got.keys() == expected.keys() == {"latents", "audio_latents", "pixels", "audio"}
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_command_line_writes_a_video_with_sound(fleet: ServedFleet, tmp_path: Path) -> None:
    assert generate(fleet, tmp_path / "output.mp4", "--param", "frame_rate=12.5") == 0
    with av.open(str(tmp_path / "output.mp4"), "r") as container:
        stream, track = container.streams.video[0], container.streams.audio[0]
        assert (stream.width, stream.height, float(stream.average_rate or 0)) == (96, 64, 12.5)
        assert (track.codec.canonical_name, track.rate, track.codec_context.channels) == ("aac", 48000, 2)
        assert len(list(container.decode(stream))) == 9
    recorded = decoded_sound((tmp_path / "output.mp4").read_bytes())
    assert recorded.shape[1] / 48000 == pytest.approx(9 / 12.5, abs=0.05)


def test_the_command_line_lists_both_variants(fleet: ServedFleet, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--endpoint", fleet.endpoint]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ltx2 (LTX2Pipeline), checkpoint ")
    common = "latent_preparation, denoising, decoding"
    assert [line for line in lines if "variant" in line] == [
        f"  variant text: no images; services text_encoding, {common}",
        f"  variant image: image; services text_encoding, image_encoding, {common}",
    ]


def test_too_short_audio_is_refused_at_submission(fleet: ServedFleet) -> None:
    with pytest.raises(InvalidInput, match="too short for audio") as refused:
        fleet.generate("ltx2", num_inference_steps=STEPS, **GIVEN | {"num_frames": 1, "frame_rate": 240.0})
    assert refused.value.field == "num_frames"


def test_more_cfg_ranks_than_branches_are_refused(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "launch", lambda *_: pytest.fail("a worker group was started"))
    flags = ("--model", f"ltx2={model.checkpoint.path}", "--redis", "unix:///x", "--cfg", "5", "--device", "cpu")
    assert denoising.main([*flags]) == 2
    message = "cfg: 5 is not at most 4; LTX2Pipeline has 4 branches: positive, negative, perturbed, isolated"
    assert message in capsys.readouterr().err
