"""Parity of Wan's SamplingParams with the installed Diffusers: defaults, rounding, limits."""

from __future__ import annotations

import inspect
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from common.checkpoint import Checkpoint
from common.errors import CheckpointError, InvalidInput
from configs.sample.base import SamplingParams
from configs.sample.wan import WanImageToVideoSamplingParams, WanSamplingParams
from models.catalog import open_model
from models.registry import load_registry
from models.validation import InputValidationStage
from tiny_wan import build_tiny_wan, build_tiny_wan_i2v, build_tiny_wan_ti2v

RENAMED = {"num_videos_per_prompt": "num_outputs_per_prompt"}
# Arguments without a request parameter, input images, and arguments of Wan 2.2 only.
NOT_SERVED = {
    *("self", "generator", "output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
    *("latents", "prompt_embeds", "negative_prompt_embeds", "image_embeds", "attention_kwargs"),
    *("image", "last_image", "guidance_scale_2"),
}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(build_tiny_wan(tmp_path_factory.mktemp("wan") / "t2v"))


@pytest.mark.parametrize(
    ("pipeline", "params"),
    [(WanPipeline, WanSamplingParams), (WanImageToVideoPipeline, WanImageToVideoSamplingParams)],
)
def test_every_supported_argument_of_diffusers_is_a_parameter_with_the_same_default(
    wan: Checkpoint, pipeline: Any, params: type[SamplingParams]
) -> None:
    arguments = inspect.signature(pipeline.__call__).parameters
    served = {spec.name: spec.default for spec in params.parameters(wan)}
    for name, argument in arguments.items():
        if name not in NOT_SERVED:
            assert served[RENAMED.get(name, name)] == argument.default, name


@pytest.mark.parametrize(
    ("given", "field", "message"),
    [
        ({"height": 40}, "height", "height: 40 is not a multiple of 16; 32 or 48 works"),
        ({"width": 8}, "width", "width: 8 is not a multiple of 16; 16 works"),
        ({"num_frames": 0}, "num_frames", "num_frames: 0 is not a whole number from 1 to 4093"),
        ({"num_frames": 4097}, "num_frames", "from 1 to 4093"),
        ({"num_frames": 4093}, "height", "height x width x num_frames: .* pixels are not at most 268435456"),
        ({"num_outputs_per_prompt": 9}, "num_outputs_per_prompt", "9 is not at most 8 at 480 x 832 x 81"),
        ({"max_sequence_length": 513}, "max_sequence_length", "from 1 to 512"),
        ({"frame_rate": 0.0}, "frame_rate", "from 1.0 to 240.0"),
        ({"guidance_scale_2": 3.0}, "guidance_scale_2", "WanPipeline has no parameter 'guidance_scale_2'"),
        ({"output_format": "png"}, "output_format", "output_format: 'png' is not mp4 or safetensors"),
    ],
)
def test_invalid_parameters_are_refused(wan: Checkpoint, given: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        WanSamplingParams.build({"prompt": "x", **given}, wan)
    assert caught.value.field == field


@pytest.mark.parametrize("num_frames", range(1, 20))
def test_frames_are_rounded_with_a_warning(wan: Checkpoint, num_frames: int) -> None:
    params, warnings = WanSamplingParams.build({"prompt": "x", "num_frames": num_frames}, wan)
    assert params.num_frames == (num_frames if num_frames % 4 == 1 else num_frames // 4 * 4 + 1)
    assert [warning.field for warning in warnings] == (["num_frames"] if params.num_frames != num_frames else [])


def test_each_16_bit_gray_image_gets_a_warning(tmp_path: Path) -> None:
    model = open_model(str(build_tiny_wan_i2v(tmp_path / "m", last_image=True)), load_registry())
    images = {}
    for role, mode in (("image", "L"), ("last_image", "I;16")):
        file = io.BytesIO()
        Image.new(mode, (9, 9), 200).save(file, "PNG")
        images[role] = file.getvalue()
    request = InputValidationStage(model).run({"prompt": "x", "num_frames": 6}, images)
    assert [warning.field for warning in request.warnings] == ["num_frames", "last_image"]


def test_sizes_are_floored_to_whole_patches(tmp_path: Path) -> None:
    """A patch of 4 latents is 32 pixels, so a multiple of 16 may need rounding."""
    path = build_tiny_wan(tmp_path / "m")
    config = json.loads((path / "transformer" / "config.json").read_text())
    (path / "transformer" / "config.json").write_text(json.dumps(config | {"patch_size": [1, 4, 4]}))
    params, warnings = WanSamplingParams.build({"prompt": "x", "height": 48, "width": 64}, Checkpoint.open(path))
    assert (params.height, params.width) == (32, 64)
    assert [warning.field for warning in warnings] == ["height"]


@pytest.mark.parametrize(
    ("build", "entries", "message"),
    [
        (
            build_tiny_wan_ti2v,
            {"boundary_ratio": 0.9},
            "two transformers (boundary_ratio); this pipeline supports Wan 2.2 TI2V",
        ),
        (build_tiny_wan, {"boundary_ratio": 0.9}, "transformer_2"),
        (build_tiny_wan_i2v, {"boundary_ratio": 0.9}, "transformer_2"),
    ],
)
def test_checkpoints_that_mix_wan_versions_are_refused(
    tmp_path: Path, build: Callable[[Path], Path], entries: dict[str, float], message: str
) -> None:
    path = build(tmp_path / "m")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | entries))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_model(str(path), load_registry())


@pytest.mark.parametrize("pipeline_name", ["WanPipeline", "WanImageToVideoPipeline"])
def test_a_timestep_per_token_gives_two_variants(tmp_path: Path, pipeline_name: str) -> None:
    """Diffusers' two pipelines save the same modules. The image pipeline also lists an absent vision encoder."""
    path = build_tiny_wan_ti2v(tmp_path / "m")
    index = json.loads((path / "model_index.json").read_text())
    absent = {key: [None, None] for key in ("image_encoder", "image_processor", "transformer_2")}
    (path / "model_index.json").write_text(json.dumps(index | absent | {"_class_name": pipeline_name}))
    model = open_model(str(path), load_registry())
    assert [variant.label for variant in model.variants] == ["text (no images)", "image (image)"]
    assert not model.unserved
    assert model.service("image_encoding").modules == ("vae",)


def test_image_roles_depend_on_the_checkpoint(tmp_path: Path, wan: Checkpoint) -> None:
    one = Checkpoint.open(build_tiny_wan_i2v(tmp_path / "one"))
    two = Checkpoint.open(build_tiny_wan_i2v(tmp_path / "two", last_image=True))
    assert WanSamplingParams.image_roles(wan).required == ()
    assert WanImageToVideoSamplingParams.image_roles(one).required == ("image",)
    assert WanImageToVideoSamplingParams.image_roles(two).required == ("image", "last_image")


def test_the_canvas_has_size_frame_count_frame_rate_and_format(wan: Checkpoint) -> None:
    params, _ = WanSamplingParams.build({"prompt": "x", "frame_rate": 24}, wan)
    canvas = params.artifacts()["canvas"]
    assert vars(canvas) == {
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "frame_rate": 24.0,
        "output_format": "mp4",
    }
