"""Numeric parameters without bounds must be finite, and a Wan model for two images needs two latent frames."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from configs.sample.base import ParameterSpec, _checked_number
from configs.sample.wan import WanImageToVideoSamplingParams

WHOLE = ParameterSpec("count", "int", None, "")
REAL = ParameterSpec("scale", "float", None, "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None])
@pytest.mark.parametrize("spec", [WHOLE, REAL])
def test_a_value_that_is_not_a_finite_number_is_refused(spec: ParameterSpec, value: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        _checked_number(spec, value)
    assert caught.value.field == spec.name


def test_a_float_parameter_accepts_an_int_and_not_the_reverse() -> None:
    assert isinstance(_checked_number(REAL, 3), float)
    with pytest.raises(InvalidInput):
        _checked_number(WHOLE, 3.0)


def wan(positions: int | None) -> Checkpoint:
    configs: dict[str, dict[str, Any]] = {"transformer": {"pos_embed_seq_len": positions}, "vae": {}, "scheduler": {}}
    fake = SimpleNamespace(
        module_config=configs.__getitem__,
        config_of=configs.__getitem__,
        index={},
        sampling_defaults={},
        pipeline_name="WanImageToVideoPipeline",
        modules={"scheduler": ("diffusers", "UniPCMultistepScheduler")},
    )
    return cast(Checkpoint, fake)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_first_and_a_last_frame_need_two_latent_frames(frames: int) -> None:
    given: dict[str, Any] = {"prompt": "a boat", "num_frames": frames}
    with pytest.raises(InvalidInput, match=f"num_frames: {frames} is not at least 5") as caught:
        WanImageToVideoSamplingParams.build(given, wan(514))
    assert caught.value.field == "num_frames"
    params, _ = WanImageToVideoSamplingParams.build(given, wan(None))
    assert params.num_frames == 1
