"""Parity of Wan 2.2 TI2V's SamplingParams with Diffusers: defaults, rounding, image roles."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanImageToVideoPipeline, WanPipeline

from common.checkpoint import Checkpoint
from common.errors import CheckpointError, InvalidInput
from configs.sample.base import SamplingParams
from configs.sample.wan import WanSamplingParams
from configs.sample.wan_ti2v import WanTI2VImageSamplingParams, WanTI2VSamplingParams
from tiny_wan import build_tiny_wan_ti2v

SHARED = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "max_sequence_length")
KINDS = pytest.mark.parametrize("kind", [WanTI2VSamplingParams, WanTI2VImageSamplingParams])


def edit_json(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(build_tiny_wan_ti2v(tmp_path_factory.mktemp("wan") / "ti2v"))


@pytest.mark.parametrize(
    ("pipeline", "kind"),
    [(WanPipeline, WanTI2VSamplingParams), (WanImageToVideoPipeline, WanTI2VImageSamplingParams)],
)
def test_defaults_equal_those_of_the_diffusers_call(
    ti2v: Checkpoint, pipeline: Any, kind: type[SamplingParams]
) -> None:
    arguments = inspect.signature(pipeline.__call__).parameters
    defaults = {spec.name: spec.default for spec in kind.parameters(ti2v)}
    assert {name: defaults[name] for name in SHARED} == {name: arguments[name].default for name in SHARED}
    assert defaults["frame_rate"] == 24.0


@KINDS
def test_checkpoint_defaults_take_precedence(tmp_path: Path, kind: type[SamplingParams]) -> None:
    path = build_tiny_wan_ti2v(tmp_path / "m")
    published = {"height": 704, "width": 1280, "num_frames": 121}
    (path / "sampling_defaults.json").write_text(json.dumps(published))
    params, warnings = kind.build({"prompt": "x"}, Checkpoint.open(path))
    assert {**params.extent} == published
    assert not warnings


@KINDS
@pytest.mark.parametrize("height", [32, 48, 64, 80, 496])
def test_sizes_are_rounded_down_to_multiples_of_32(ti2v: Checkpoint, kind: type[SamplingParams], height: int) -> None:
    """There are 16 pixels per latent and 2 latents per patch, as in Diffusers. Odd multiples of 16 are rounded down."""
    params, warnings = kind.build({"prompt": "x", "height": height, "width": 64, "num_frames": 5}, ti2v)
    assert (params.height, params.width) == (height // 32 * 32, 64)
    assert [warning.field for warning in warnings] == (["height"] if height % 32 else [])


@KINDS
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 16}, "height: 16 is not at least 32; multiples of 32 work"),
        ({"width": 40}, "width: 40 is not a multiple of 16; 32 or 48 works"),
    ],
)
def test_sizes_that_cannot_be_rounded_are_refused(
    ti2v: Checkpoint, kind: type[SamplingParams], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        kind.build({"prompt": "x", **given}, ti2v)


@KINDS
def test_frames_are_rounded_with_a_warning(ti2v: Checkpoint, kind: type[SamplingParams]) -> None:
    params, warnings = kind.build({"prompt": "x", "num_frames": 120}, ti2v)
    assert params.extent["num_frames"] == 121
    assert [warning.field for warning in warnings] == ["num_frames"]


def test_only_the_image_variant_takes_an_image(ti2v: Checkpoint) -> None:
    assert WanTI2VSamplingParams.image_roles(ti2v).required == ()
    roles = WanTI2VImageSamplingParams.image_roles(ti2v)
    assert (roles.required, roles.optional) == (("image",), ())


@KINDS
def test_two_transformers_are_refused(tmp_path: Path, kind: type[SamplingParams]) -> None:
    path = build_tiny_wan_ti2v(tmp_path / "m")
    edit_json(path / "model_index.json", boundary_ratio=0.9)
    with pytest.raises(
        CheckpointError, match=r"two transformers \(boundary_ratio\); this pipeline supports Wan 2\.2 TI2V"
    ):
        kind.build({"prompt": "x"}, Checkpoint.open(path))


def test_wan_2_1_refuses_a_timestep_per_token(ti2v: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"a timestep for each token .* this pipeline supports Wan 2\.1"):
        WanSamplingParams.build({"prompt": "x"}, ti2v)
