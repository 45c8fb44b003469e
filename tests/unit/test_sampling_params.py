"""Sampling parameters are completed and checked before a request is accepted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bare_checkpoint import build_bare_flux
from common.artifacts import Canvas, ParamValue, Prompt, Sampling
from common.checkpoint import Checkpoint
from common.errors import CheckpointError, InvalidInput
from configs.sample.base import ParameterSpec, SamplingParams, parameter
from configs.sample.flux import FluxSamplingParams, vae_scale_factor


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(build_bare_flux(tmp_path_factory.mktemp("sampling") / "flux"))


def build(checkpoint: Checkpoint, **given: Any) -> tuple[FluxSamplingParams, dict[str, str]]:
    params, warnings = FluxSamplingParams.build({"prompt": "a red apple", **given}, checkpoint)
    assert len({warning.field for warning in warnings}) == len(warnings)
    return params, {warning.field: warning.message for warning in warnings}


def refusal(checkpoint: Checkpoint, given: dict[str, Any]) -> InvalidInput:
    with pytest.raises(InvalidInput) as refused:
        FluxSamplingParams.build({"prompt": "a red apple", **given}, checkpoint)
    return refused.value


def test_unset_parameters_have_the_models_defaults(flux: Checkpoint) -> None:
    params, warnings = build(flux, seed=7)
    assert not warnings
    assert params.as_mapping() == {
        "prompt": "a red apple",
        "height": 1024,
        "width": 1024,
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "seed": 7,
        "num_outputs_per_prompt": 1,
        "output_format": "png",
        "true_cfg_scale": 1.0,
        "max_sequence_length": 512,
    }


def test_the_caller_overrides_the_checkpoint_which_overrides_the_family(tmp_path: Path) -> None:
    defaults = {"height": 64, "num_inference_steps": 20, "guidance_scale": 1, "seed": 5}
    checkpoint = Checkpoint.open(build_bare_flux(tmp_path / "flux", sampling_defaults=defaults))
    params, warnings = build(checkpoint, num_inference_steps=3)
    assert (params.height, params.width, params.num_inference_steps, params.seed) == (64, 1024, 3, 5)
    assert type(params.guidance_scale) is float
    assert not warnings
    assert {spec.name: spec.default for spec in FluxSamplingParams.parameters(checkpoint)}["height"] == 64


def test_the_native_size_depends_on_the_scale_factor_of_the_vae(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(build_bare_flux(tmp_path / "flux", vae_blocks=2))
    params, warnings = build(checkpoint, width=30)
    assert vae_scale_factor(checkpoint) == 2
    assert (params.height, params.width) == (256, 28)
    assert warnings == {"width": "30 is not a multiple of 4; 28 is used instead"}


def test_a_vae_without_a_scale_factor_is_refused(tmp_path: Path) -> None:
    path = build_bare_flux(tmp_path / "flux")
    (path / "vae/config.json").write_text('{"latent_channels": 16}')
    with pytest.raises(CheckpointError, match="block_out_channels"):
        FluxSamplingParams.build({"prompt": ""}, Checkpoint.open(path))


def test_completed_parameters_stay_unchanged(flux: Checkpoint) -> None:
    """The parameters of a stored record give the same request, without warnings."""
    params, warnings = build(flux, height=100, negative_prompt="", true_cfg_scale=2, sigmas=[1, 0.5], seed=2**63 - 1)
    assert warnings.keys() == {"height"}
    assert FluxSamplingParams.build(params.as_mapping(), flux) == (params, ())


def test_an_unset_seed_is_drawn(flux: Checkpoint) -> None:
    seeds = {build(flux)[0].seed for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_every_value_is_sent_in_exactly_one_artifact(flux: Checkpoint) -> None:
    params, _ = build(flux, seed=1, negative_prompt="", prompt_2="two", true_cfg_scale=2.0, sigmas=(1.0, 0.25))
    assert params.artifacts() == {
        "prompt": Prompt(prompt="a red apple", negative_prompt="", prompt_2="two", max_sequence_length=512),
        "canvas": Canvas(height=1024, width=1024),
        "sampling": Sampling(num_inference_steps=2, seed=1, guidance_scale=3.5, true_cfg_scale=2.0, sigmas=(1.0, 0.25)),
    }


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "zero steps": ({"num_inference_steps": 0}, "0 is not a whole number from 1 to 1000"),
    "negative steps": ({"num_inference_steps": -4}, "-4 is not a whole number from 1 to 1000"),
    "too many steps": ({"num_inference_steps": 1001}, "from 1 to 1000"),
    "steps as a float": ({"num_inference_steps": 4.0}, "a whole number"),
    "steps as a boolean": ({"num_inference_steps": True}, "True is not a whole number from 1 to 1000"),
    "steps as a string": ({"num_inference_steps": "4"}, "'4' is not a whole number from 1 to 1000"),
    "zero height": ({"height": 0}, "0 is not a whole number from 1 to 8192"),
    "a size that rounds to 0": ({"width": 15}, "width: 15 is not at least 16"),
    "a huge size": ({"height": 2**62}, "from 1 to 8192"),
    "a huge area": ({"height": 8192, "width": 8192}, "8192 x 8192 pixels are not at most 16777216"),
    "too many outputs": ({"num_outputs_per_prompt": 17}, "17 is not at most 16 at 1024 x 1024"),
    "no output": ({"num_outputs_per_prompt": 0}, "0 is not a whole number from 1 to 64; if it is unset, 1 is used"),
    "NaN guidance": ({"guidance_scale": math.nan}, "nan is not a finite number from 0.0 to 1000.0"),
    "infinite guidance": ({"true_cfg_scale": math.inf}, "a finite number"),
    "negative guidance": ({"guidance_scale": -0.1}, "-0.1 is not a finite number from 0.0 to 1000.0"),
    "guidance beyond floats": ({"guidance_scale": 10**400}, "from 0.0 to 1000.0"),
    "guidance as a list": ({"guidance_scale": (1.0,)}, "a finite number"),
    "negative seed": ({"seed": -1}, "; if it is unset, a random seed is drawn"),
    "seed over 63 bits": ({"seed": 2**63}, "from 0 to 9223372036854775807"),
    "prompt of another type": ({"prompt": 3}, "prompt: 3 is not a text"),
    "prompt too long": ({"prompt": "é" * 32769}, "65538 bytes of UTF-8 are not at most 65536"),
    "prompt that is not Unicode": ({"prompt": "\udcff"}, "not valid Unicode"),
    "second prompt too long": ({"negative_prompt_2": "x" * 65537}, "65537 bytes of UTF-8 are not at most 65536"),
    "too many tokens": ({"max_sequence_length": 513}, "513 is not a whole number from 1 to 512"),
    "no tokens": ({"max_sequence_length": 0}, "0 is not a whole number from 1 to 512"),
    "rising sigmas": ({"sigmas": (0.5, 1.0)}, "sigmas: 1.0 after 0.5 is not in descending order"),
    "a sigma of zero": ({"sigmas": (1.0, 0.0)}, "0.0 is not a list of finite numbers from 1e-06 to 1.0"),
    "a sigma of NaN": ({"sigmas": (math.nan,)}, "nan is not a list"),
    "a sigma as a string": ({"sigmas": ("1",)}, "'1' is not a list"),
    "a single sigma": ({"sigmas": 1.0}, "a list of finite numbers"),
    "too many sigmas": ({"sigmas": (0.5,) * 1001}, "1001 values are not at most 1000"),
    "video": ({"output_format": "mp4"}, "'mp4' is not png or safetensors"),
    "unknown": ({"num_frames": 9}, "FluxPipeline has no parameter 'num_frames'"),
    "misspelled": ({"guidance_scael": 2.0}, "did you mean guidance_scale?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_invalid_value_is_refused(flux: Checkpoint, case: str) -> None:
    given, message = REFUSED[case]
    error = refusal(flux, given)
    assert error.field == next(iter(given))
    assert error.field in error.message
    assert message in error.message
    assert len(error.message) < 400


def test_a_prompt_is_required_and_may_be_empty(flux: Checkpoint) -> None:
    with pytest.raises(InvalidInput, match="prompt: the value is missing") as refused:
        FluxSamplingParams.build({}, flux)
    assert refused.value.field == "prompt"
    assert FluxSamplingParams.build({"prompt": ""}, flux)[0].prompt == ""


@pytest.mark.parametrize("given", [{"prompt": "x" * 65536}, {"prompt": "é" * 32768}, {"width": 16}, {"width": 8192}])
def test_bounds_are_inclusive(flux: Checkpoint, given: dict[str, Any]) -> None:
    FluxSamplingParams.build({"prompt": "", **given}, flux)


def test_sigmas_decide_the_number_of_steps(flux: Checkpoint) -> None:
    assert build(flux, sigmas=(1.0, 0.6, 0.3))[1] == {}
    params, warnings = build(flux, sigmas=(1.0, 0.6, 0.3), num_inference_steps=20)
    assert params.num_inference_steps == 3
    assert warnings == {"num_inference_steps": "20 is not the number of sigmas; 3 is used instead"}


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        ({"negative_prompt": "x"}, {"negative_prompt"}),
        ({"negative_prompt": "x", "negative_prompt_2": "y", "true_cfg_scale": 2.0}, set()),
        ({"negative_prompt_2": "y", "true_cfg_scale": 2.0}, {"negative_prompt_2", "true_cfg_scale"}),
        ({"true_cfg_scale": 1.0}, set()),
        ({"guidance_scale": 5.0}, set()),
    ],
)
def test_a_parameter_without_effect_gives_a_warning(flux: Checkpoint, given: dict[str, Any], warned: set[str]) -> None:
    assert build(flux, **given)[1].keys() == warned


def test_guidance_without_an_embedding_has_no_effect(tmp_path: Path) -> None:
    schnell = Checkpoint.open(build_bare_flux(tmp_path / "flux", guidance_embeds=False))
    assert build(schnell)[1] == {}
    assert build(schnell, guidance_scale=5.0)[1].keys() == {"guidance_scale"}


def test_a_family_reports_its_parameters(flux: Checkpoint) -> None:
    specs = {spec.name: spec for spec in FluxSamplingParams.parameters(flux)}
    assert specs["height"] == ParameterSpec("height", "int", 1024, "Height in pixels.", 1, 8192)
    assert (specs["prompt"].default, specs["seed"].default, specs["sigmas"].default) == (None, None, None)
    assert {spec.type for spec in specs.values()} == {"string", "int", "float", "floats"}
    assert all(spec.description.endswith(".") for spec in specs.values())
    assert {spec.name for spec in FluxSamplingParams.parameters()} == specs.keys()


@dataclass(frozen=True, kw_only=True)
class ClipParams(SamplingParams):
    output_formats = ("mp4", "safetensors")
    max_total_pixels = 1024

    height: int = 32
    width: int = 32
    num_inference_steps: int = 5
    guidance_scale: float = 6.0
    num_frames: int = parameter("Frames.", 9, minimum=1, maximum=17)
    frame_rate: float = parameter("Frames a second.", 8.0, minimum=1.0)
    looped: bool = parameter("Whether the end meets the beginning.", False)


def test_another_family_declares_only_its_own_parameters(flux: Checkpoint) -> None:
    params, _ = ClipParams.build({"prompt": "x", "seed": 1, "looped": True, "frame_rate": 12}, flux)
    assert params.artifacts()["canvas"] == Canvas(
        height=32, width=32, num_frames=9, frame_rate=12.0, output_format="mp4"
    )
    assert params.artifacts()["sampling"] == Sampling(
        num_inference_steps=5, seed=1, guidance_scale=6.0, params={"looped": True}
    )
    for wrong, message in (
        ({"looped": 1}, "looped: 1 is not true or false"),
        ({"frame_rate": 0.5}, "a finite number, at least 1.0"),
        ({"output_format": "png"}, "mp4 or safetensors"),
        ({"width": 33}, "32 x 33 pixels are not at most 1024"),
        ({"num_outputs_per_prompt": 2}, "2 is not at most 1 at 32 x 32"),
        ({"true_cfg_scale": 2.0}, "no parameter 'true_cfg_scale'"),
    ):
        with pytest.raises(InvalidInput, match=message):
            ClipParams.build({"prompt": "x", **wrong}, flux)


def test_a_field_of_an_unsupported_type_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wrong(SamplingParams):
        layers: bytes = parameter("Layers.", None)

    with pytest.raises(TypeError, match=r"Wrong\.layers"):
        Wrong.parameters()


VALUES = st.one_of(
    st.booleans(), st.integers(), st.integers(0, 2000), st.floats(), st.text(max_size=8), st.tuples(st.floats(0, 1))
)


@settings(max_examples=200)
@given(given=st.dictionaries(st.sampled_from([spec.name for spec in FluxSamplingParams.parameters()]), VALUES))
def test_any_value_is_accepted_or_refused_with_its_field(flux: Checkpoint, given: dict[str, ParamValue]) -> None:
    try:
        params, _ = FluxSamplingParams.build({"prompt": "x", **given}, flux)
    except InvalidInput as error:
        problem, field = error.message, error.field
    else:
        problem, field = "", ""
        assert params.height % 16 == params.width % 16 == 0
        assert params.height * params.width * params.num_outputs_per_prompt <= 2**24
        assert FluxSamplingParams.build(params.as_mapping(), flux)[0] == params
    assert not problem or (field in given and field in problem)
