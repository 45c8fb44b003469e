"""Parity of LTX-2's SamplingParams with the installed Diffusers: defaults, bounds, refused values."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from diffusers import LTX2ImageToVideoPipeline, LTX2Pipeline

from common.artifacts import Canvas, ParamValue, Sampling
from common.checkpoint import Checkpoint
from common.errors import CheckpointError, InvalidInput
from configs.sample.base import SamplingParams
from configs.sample.ltx2 import LTX2ImageToVideoSamplingParams, LTX2SamplingParams
from models.catalog import open_model
from models.registry import load_registry
from tiny_ltx2 import REGISTERS, build_tiny_ltx2, edit_json
from tiny_wan import build_tiny_wan

SHARED = (
    *("height", "width", "frame_rate", "motion_speed", "num_inference_steps", "guidance_scale", "stg_scale"),
    *("modality_scale", "guidance_rescale", "audio_guidance_scale", "audio_stg_scale", "audio_modality_scale"),
    *("audio_guidance_rescale", "use_cross_timestep", "max_sequence_length"),
)
KINDS = pytest.mark.parametrize("kind", [LTX2SamplingParams, LTX2ImageToVideoSamplingParams])


@pytest.fixture(scope="module")
def ltx2(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(build_tiny_ltx2(tmp_path_factory.mktemp("ltx2") / "m"))


@pytest.mark.parametrize(
    ("pipeline", "kind"),
    [(LTX2Pipeline, LTX2SamplingParams), (LTX2ImageToVideoPipeline, LTX2ImageToVideoSamplingParams)],
)
def test_defaults_equal_those_of_the_diffusers_call(
    ltx2: Checkpoint, pipeline: Any, kind: type[SamplingParams]
) -> None:
    arguments = inspect.signature(pipeline.__call__).parameters
    defaults = {spec.name: spec.default for spec in kind.parameters(ltx2)}
    assert {name: defaults[name] for name in SHARED} == {name: arguments[name].default for name in SHARED}
    assert defaults["spatio_temporal_guidance_blocks"] == (28.0,)
    assert arguments["spatio_temporal_guidance_blocks"].default == [28]
    # Diffusers replaces num_frames=None by 121 without a duration head, and image_crf=None by 33 with Gemma 3.
    assert (arguments["num_frames"].default, defaults["num_frames"]) == (None, 121)
    if kind is LTX2ImageToVideoSamplingParams:
        assert (arguments["image_crf"].default, defaults["image_crf"]) == (None, 33)


@KINDS
def test_audio_scales_of_0_default_to_the_video_scales(ltx2: Checkpoint, kind: type[LTX2SamplingParams]) -> None:
    given: dict[str, ParamValue] = {"guidance_scale": 4.0, "stg_scale": 2.0, "modality_scale": 5.0}
    given |= {"guidance_rescale": 0.25}
    given |= {f"audio_{name}": 0.0 for name in given}
    params, warnings = kind.build({"prompt": "x", **given}, ltx2)
    audio_scales = (params.audio_guidance_scale, params.audio_stg_scale, params.audio_modality_scale)
    assert (*audio_scales, params.audio_guidance_rescale) == (4.0, 2.0, 5.0, 0.25)
    assert {warning.field for warning in warnings} >= {name for name in given if name.startswith("audio_")}
    rebuilt, _ = kind.build(params.as_mapping(), ltx2)
    assert rebuilt == params, "the request is equal when it is rebuilt from its parameters"


def test_motion_speed_changes_positions_and_not_the_frame_rate(ltx2: Checkpoint) -> None:
    params, _ = LTX2SamplingParams.build({"prompt": "x", "frame_rate": 30.0, "motion_speed": 0.2}, ltx2)
    canvas, sampling = params.artifacts()["canvas"], params.artifacts()["sampling"]
    assert isinstance(canvas, Canvas)
    assert isinstance(sampling, Sampling)
    assert canvas.frame_rate == 30.0
    assert sampling.params["conditioning_frame_rate"] == 30.0 / 0.2


@KINDS
@pytest.mark.parametrize(
    ("given", "field", "message"),
    [
        ({"height": 80}, "height", "height: 80 is not a multiple of 32 of at least 64; 64 or 96 works"),
        ({"width": 32}, "width", "width: 32 is not a multiple of 32 of at least 64; 64 or 96 works"),
        (
            {"num_frames": 1, "frame_rate": 240.0},
            "num_frames",
            r"1 at frame_rate 240.0 is 0.0042 seconds, .* too short for audio; at least 5 frames or",
        ),
        ({"frame_rate": 0.0}, "frame_rate", "frame_rate: 0.0 is not a finite number from 1.0 to 240.0"),
        ({"num_frames": 0}, "num_frames", "num_frames: 0 is not a whole number from 1 to 4089"),
        (
            {"max_sequence_length": REGISTERS + 1},
            "max_sequence_length",
            f"{REGISTERS + 1} is not a multiple of {REGISTERS}; {REGISTERS} works",
        ),
        (
            {"spatio_temporal_guidance_blocks": ()},
            "spatio_temporal_guidance_blocks",
            "an empty list is not allowed with stg_scale or audio_stg_scale above 0; blocks from 0 to 2 work",
        ),
        ({"spatio_temporal_guidance_blocks": (1.5,)}, "spatio_temporal_guidance_blocks", "1.5 is not the index of"),
        ({"spatio_temporal_guidance_blocks": (-1.0,)}, "spatio_temporal_guidance_blocks", "from 0 to 1000"),
        ({"motion_speed": 0.0}, "motion_speed", "motion_speed: 0.0 is not a finite number from 0.01 to 100.0"),
        ({"num_inference_steps": 1}, "num_inference_steps", "num_inference_steps: 1 is not at least 2"),
        ({"sigmas": (0.5, 0.7)}, "sigmas", "sigmas: 0.7 after 0.5 is not in descending order"),
        ({"output_format": "png"}, "output_format", "output_format: 'png' is not mp4 or safetensors"),
        ({"vocoder_scale": 1.0}, "vocoder_scale", "has no parameter"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_unsupported_requests_are_refused(
    ltx2: Checkpoint, kind: type[SamplingParams], given: dict[str, ParamValue], field: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as refused:
        kind.build({"prompt": "x", **given}, ltx2)
    assert refused.value.field == field


def test_a_video_with_the_shortest_supported_audio_is_accepted(ltx2: Checkpoint) -> None:
    params, _ = LTX2SamplingParams.build({"prompt": "x", "num_frames": 5, "frame_rate": 240.0}, ltx2)
    assert params.num_frames == 5


def test_only_the_image_variant_takes_an_image(ltx2: Checkpoint) -> None:
    assert LTX2SamplingParams.image_roles(ltx2).required == ()
    roles = LTX2ImageToVideoSamplingParams.image_roles(ltx2)
    assert (roles.required, roles.optional) == (("image",), ())
    with pytest.raises(InvalidInput, match="has no parameter 'image_crf'"):
        LTX2SamplingParams.build({"prompt": "x", "image_crf": 0}, ltx2)


@pytest.mark.parametrize("name", ["audio_guidance_scale", "audio_stg_scale", "modality_scale"])
def test_audio_parameters_are_refused_by_a_model_without_audio(tmp_path: Path, name: str) -> None:
    model = open_model(str(build_tiny_wan(tmp_path / "wan")), load_registry())
    with pytest.raises(InvalidInput, match=f"WanPipeline has no parameter '{name}'") as refused:
        model.variants[0].sampling_params.build({"prompt": "x", name: 2.0}, model.checkpoint)
    assert refused.value.field == name


@pytest.mark.parametrize("module", ["vocoder", "audio_vae", "connectors"])
def test_a_checkpoint_without_one_of_its_modules_is_refused(tmp_path: Path, module: str) -> None:
    """Diffusers does not load a directory without the module. With a null entry, its call fails."""
    path = build_tiny_ltx2(tmp_path / "m")
    edit_json(path / "model_index.json", **{module: [None, None]})
    with pytest.raises(CheckpointError, match=f"LTX2Pipeline needs .*{module}"):
        open_model(str(path), load_registry())


def test_a_model_that_predicts_durations_is_refused(tmp_path: Path) -> None:
    """LTX-2.5, which predicts durations, has another architecture."""
    path = build_tiny_ltx2(tmp_path / "m")
    edit_json(path / "transformer" / "config.json", use_prompt_adaln_single=False)
    with pytest.raises(CheckpointError, match="use_prompt_adaln_single: False is not True"):
        open_model(str(path), load_registry())
