"""Parity of all Wan 2.2 A14B stages with Diffusers: text to video, and one or two images to video."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanImageToVideoPipeline, WanPipeline

from coarse_images import coarse_image, png
from common.errors import CheckpointError, InvalidInput
from common.pipeline import MissingModules
from local_fleet import reference_run, relative_error
from models.catalog import open_model
from models.registry import load_registry, resolve
from models.validation import InputValidationStage
from tiny_wan import build_tiny_wan_a14b, build_tiny_wan_a14b_i2v
from wan_pair import LATENTS_WITHIN, Pair, check, open_pair

SEED = 7
Request = dict[str, Any]

# By default, transformer runs the first of three steps, and transformer_2 runs the others.
TEXT: dict[str, Request] = {
    "guidance with a scale per expert": {"guidance_scale": 5.0, "guidance_scale_2": 2.0, "num_frames": 5},
    "one scale for both": {"guidance_scale": 3.0, "negative_prompt": "old stone", "num_outputs_per_prompt": 2},
    "guidance_scale of 1 disables guidance of both experts": {"guidance_scale": 1.0, "guidance_scale_2": 4.0},
    "guidance with a second scale below 1": {"guidance_scale": 4.0, "guidance_scale_2": 0.5},
    "one expert only, cropped rows": {"num_inference_steps": 1, "height": 32, "width": 48, "num_frames": 7},
}
IMAGE: dict[str, tuple[Request, bool]] = {
    "first frame": ({"num_frames": 5, "guidance_scale_2": 2.0}, False),
    "first and last frame": ({"num_frames": 9, "num_inference_steps": 2}, True),
    "one frame, without guidance": ({"num_frames": 1, "guidance_scale": 1.0}, False),
    "wide, many steps": ({"width": 64, "num_inference_steps": 8, "guidance_scale_2": 3.0}, False),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = open_pair(build_tiny_wan_a14b(tmp_path_factory.mktemp("wan") / "a14b"), WanPipeline)
    yield pair
    pair[0].close()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = open_pair(build_tiny_wan_a14b_i2v(tmp_path_factory.mktemp("wan") / "a14b-i2v"), WanImageToVideoPipeline)
    yield pair
    pair[0].close()


def given(**others: Any) -> Request:
    """A small request."""
    size = {"height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 3, "guidance_scale": 5.0, "seed": SEED}
    return {"prompt": "a red apple on the moon", **size, **others}


@pytest.mark.parametrize("case", TEXT)
def test_text_to_video_matches_diffusers(text: Pair, case: str) -> None:
    fleet, pipeline = text
    request = given(**TEXT[case])
    outputs = request.get("num_outputs_per_prompt", 1)
    call = {name: value for name, value in request.items() if name != "num_outputs_per_prompt"}
    check(fleet.tensors(**request), reference_run(pipeline, num_videos_per_prompt=outputs, **call))


@pytest.mark.parametrize("case", IMAGE)
def test_image_to_video_matches_diffusers(image: Pair, case: str) -> None:
    fleet, pipeline = image
    changes, has_last = IMAGE[case]
    images: dict[str, Any] = {"image": coarse_image(90, 50, seed=1)}
    images |= {"last_image": coarse_image(40, 60, seed=2)} if has_last else {}
    ours = fleet.tensors(images={role: png(each) for role, each in images.items()}, **given(**changes))
    check(ours, reference_run(pipeline, **images, **given(**changes)))


@pytest.mark.parametrize("change", [{"guidance_scale": 2.0}, {"guidance_scale_2": 2.0}, {"prompt": "a car"}], ids=str)
def test_every_input_changes_the_result(text: Pair, change: Request) -> None:
    """Negative control: each changed input moves the latents by more than 10 times the parity tolerance."""
    before, after = (text[0].tensors(**given(**request))["latents"] for request in ({"guidance_scale_2": 5.0}, change))
    assert relative_error(after, before) > 10 * LATENTS_WITHIN


def test_unsupported_image_roles_are_refused(text: Pair, image: Pair) -> None:
    file = png(coarse_image(8, 8, seed=0))
    validate = InputValidationStage(image[0].model)
    for roles, field in (((), "image"), (("image", "last_image", "image_1"), "image_1")):
        with pytest.raises(InvalidInput, match=field):
            validate.run(given(), dict.fromkeys(roles, file))
    with pytest.raises(InvalidInput, match="num_frames: 1 is not at least 5"):
        validate.run(given(), {"image": file, "last_image": file})
    with pytest.raises(InvalidInput, match="image"):
        InputValidationStage(text[0].model).run(given(), {"image": file})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 40}, "height: 40 is not a multiple of 16; 32 or 48 works"),
        ({"num_frames": 0}, "num_frames: 0 is not"),
        ({"guidance_scale_2": -1.0}, "guidance_scale_2: -1.0 is not .*; if it is unset, guidance_scale is used"),
    ],
    ids=str,
)
def test_invalid_values_are_refused(text: Pair, change: Request, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        InputValidationStage(text[0].model).run(given(**change))


def test_frames_are_rounded_with_a_warning(text: Pair) -> None:
    validated = InputValidationStage(text[0].model).run(given(num_frames=7))
    assert [warning.field for warning in validated.warnings] == ["num_frames"]
    assert validated.params.extent["num_frames"] == 5


@pytest.fixture
def copied(text: Pair, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may modify."""
    return Path(shutil.copytree(text[0].model.checkpoint.path, tmp_path / "m"))


@pytest.mark.parametrize("name", ["transformer", "transformer_2"])
def test_a_missing_expert_is_refused(copied: Path, name: str) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps(index | {name: [None, None]}))
    with pytest.raises(MissingModules, match=f"{name}\\b"):
        open_model(str(copied), load_registry())


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        (
            "transformer_2/config.json",
            {"num_layers": 3},
            "num_layers: 3 is not 2, transformer's value; both",
        ),
        ("model_index.json", {"boundary_ratio": 1.5}, "boundary_ratio: 1.5 is not a number from 0 to 1"),
        ("model_index.json", {"boundary_ratio": True}, "boundary_ratio: True is not a number from 0 to 1"),
    ],
)
def test_an_inconsistent_checkpoint_is_refused(copied: Path, file: str, entries: dict[str, Any], message: str) -> None:
    config = json.loads((copied / file).read_text())
    (copied / file).write_text(json.dumps(config | entries))
    with pytest.raises(CheckpointError, match=message):
        opened_config(copied)


def test_experts_with_image_tokens_are_refused(copied: Path) -> None:
    for name in ("transformer", "transformer_2"):
        file = copied / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"image_dim": 24, "added_kv_proj_dim": 64}))
    with pytest.raises(CheckpointError, match=r"image_dim: 24 is not null; Wan 2\.2 A14B reads images"):
        opened_config(copied)


def opened_config(path: Path) -> Any:
    """Read the pipeline config, as a service does before it loads weights."""
    model = open_model(str(path), load_registry())
    assert [variant.name for variant in model.variants] == ["experts"]
    config_class: Any = resolve(model.variants[0].pipeline_config)
    return config_class.from_checkpoint(model.checkpoint)


def test_the_boundary_ratio_is_converted_to_a_timestep(text: Pair) -> None:
    config = opened_config(text[0].model.checkpoint.path)
    assert config.boundary == 875.0
