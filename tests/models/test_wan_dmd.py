"""Few-step Wan: parity with a loop over Diffusers' transformer, byte-equal resume, and parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.artifacts import ParamValue, StepCheckpoint
from common.checkpoint import Checkpoint
from common.codec import pack, unpack
from common.errors import Cancelled, CheckpointError, HandedOver, InvalidInput
from common.tensors import TORCH
from configs.pipeline_configs.dmd import nearest_levels, warped_levels
from configs.sample.wan_dmd import WanDMDSamplingParams
from local_fleet import NO_IMAGES, open_fleet, relative_error
from models.catalog import open_model
from models.registry import load_registry
from tiny_wan import build_tiny_wan_dmd, build_tiny_wan_ti2v, edit_json
from wan_dmd_loops import SIZE, DmdLoop, RecordedCall, Request, reference_dmd

STEPS = 3
FRAMES = 9


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return build_tiny_wan_dmd(tmp_path_factory.mktemp("wan") / "dmd")


@pytest.fixture(scope="module")
def loop(path: Path) -> DmdLoop:
    return DmdLoop(path)


@pytest.mark.parametrize(("num_frames", "outputs"), [(FRAMES, 1), (5, 2)])
def test_latents_match_a_reference_loop(loop: DmdLoop, num_frames: int, outputs: int) -> None:
    x = loop.inputs(num_frames, seed=5, outputs=outputs)
    got = loop.run(x)
    expected = reference_dmd(loop.path, Request.of(x))
    assert got.shape == expected.shape
    assert relative_error(got, expected) <= 1e-4


def test_wan_2_2_from_text_is_served(tmp_path: Path) -> None:
    """FastWan2.2-TI2V with full attention. Without an image, `expand_timesteps` gives all tokens one timestep."""
    path = build_tiny_wan_ti2v(tmp_path / "ti2v")
    edit_json(path / "model_index.json", {"_class_name": "WanDMDPipeline"})
    (variant,) = open_model(str(path), load_registry()).variants
    assert {spec.name: spec.default for spec in variant.specs}["frame_rate"] == 24.0
    loop = DmdLoop(path)
    x = loop.inputs(FRAMES)
    assert relative_error(loop.run(x), reference_dmd(path, Request.of(x))) <= 1e-4


def test_weights_of_sparse_attention_are_refused(tmp_path: Path) -> None:
    """FastWan's sparse attention has gates; with its weights, full attention would give wrong results."""
    path = build_tiny_wan_dmd(tmp_path / "sparse")
    (file,) = (path / "transformer").glob("*.safetensors")
    weights = load_file(file)
    gate = {f"blocks.{index}.to_gate_compress.weight": torch.zeros(64, 64) for index in range(2)}
    save_file(weights | gate, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="to_gate_compress"):
        DmdLoop(path).stage()


def test_a_loop_resumes_after_every_step_to_the_same_bytes(loop: DmdLoop) -> None:
    """Step checkpoints, which include the generator's state, are serialized and parsed."""
    x, recorded = loop.inputs(FRAMES), RecordedCall()
    whole = loop.run(x, recorded)
    assert [state.step for state in recorded.states] == list(range(1, STEPS))
    for state in recorded.states:
        assert state.generator is not None
        sent = unpack("state", StepCheckpoint, pack("state", state, TORCH), TORCH)
        rest = RecordedCall()
        assert torch.equal(loop.run(replace(x, resume_from=sent), rest), whole), f"after step {state.step}"
        assert rest.steps == [(step, STEPS) for step in range(state.step + 1, STEPS + 1)]


def test_the_noise_of_each_step_is_drawn_from_the_generator_of_the_request(loop: DmdLoop) -> None:
    x, recorded = loop.inputs(FRAMES), RecordedCall()
    loop.run(x, recorded)
    other = loop.inputs(FRAMES, seed=4)
    assert not torch.equal(loop.run(replace(x, latents_generator=other.latents_generator)), loop.run(x))
    first, second = (state.generator for state in recorded.states)
    assert first is not None
    assert second is not None
    assert not torch.equal(first.state, second.state)


def test_a_loop_without_a_generator_is_refused(loop: DmdLoop) -> None:
    with pytest.raises(InvalidInput) as caught:
        loop.run(replace(loop.inputs(FRAMES), latents_generator=None))
    assert caught.value.field == "latents_generator"


def test_cancellation_ends_the_loop_within_a_step(loop: DmdLoop) -> None:
    recorded = RecordedCall()
    call = recorded.call(lambda *_: call.cancelled.set())
    with pytest.raises(Cancelled):
        loop.stage().run(loop.inputs(FRAMES), call)
    assert recorded.steps == [(1, STEPS)]


def test_a_loop_resumes_after_a_hand_over_to_the_same_bytes(loop: DmdLoop) -> None:
    x, recorded = loop.inputs(FRAMES), RecordedCall()
    whole, call = loop.run(x), recorded.call(lambda *_: call.hand_over.set())
    with pytest.raises(HandedOver):
        loop.stage().run(x, call)
    assert torch.equal(loop.run(replace(x, resume_from=recorded.states[-1])), whole)


def test_noise_levels_match_diffusers_flow_schedule() -> None:
    """FastWan lists timesteps of the shifted schedule. Self Forcing lists timesteps of the unshifted schedule."""
    levels = dict(nearest_levels((1000.0, 757.0, 522.0), 8.0))
    assert levels[1000.0] == 1.0
    assert all(abs(level - timestep / 1000) < 1e-3 for timestep, level in levels.items())
    expected = [(1000.0, 1.0), (937.5, 0.9375), (2500 / 3, 5 / 6), (625.0, 0.625)]
    assert warped_levels((1000.0, 750.0, 500.0, 250.0), 5.0) == [pytest.approx(each) for each in expected]


def test_the_services_generate_a_video(path: Path) -> None:
    """The published defaults contain the timesteps; the directory's scheduler config is not read."""
    model = open_model(str(path), load_registry())
    assert "scheduler" not in {name for service in model.services for name in service.modules}
    edit_json(path / "scheduler" / "scheduler_config.json", {"_class_name": "SelfForcingFlowMatchScheduler"})
    fleet = open_fleet(str(path))
    given: dict[str, ParamValue] = {"seed": 3, "prompt": "a red apple", "num_frames": 5, **SIZE}
    tensors = fleet.tensors(None, NO_IMAGES, **given)
    assert tensors["pixels"].shape[0] == 1
    assert bool(tensors["latents"].isfinite().all())
    fleet.close()


def test_the_defaults_equal_fastwan(path: Path) -> None:
    params, warnings = WanDMDSamplingParams.build({"prompt": "", "seed": 0}, Checkpoint.open(path))
    assert (params.dmd_denoising_steps, params.flow_shift) == ((1000.0, 757.0, 522.0), 8.0)
    assert (params.num_inference_steps, params.guidance_scale, params.branches) == (3, 1.0, 1)
    assert not warnings


def test_the_step_count_is_the_number_of_timesteps(path: Path) -> None:
    timesteps = (988.0, 932.0, 852.0, 608.0)
    given: dict[str, ParamValue] = {"prompt": "", "num_inference_steps": 50, "dmd_denoising_steps": timesteps}
    params, (warning,) = WanDMDSamplingParams.build(given, Checkpoint.open(path))
    assert params.num_inference_steps == 4
    assert warning.field == "num_inference_steps"
    rebuilt, warnings = WanDMDSamplingParams.build(params.as_mapping(), Checkpoint.open(path))
    assert (rebuilt, warnings) == (params, ())


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"dmd_denoising_steps": (757.0, 1000.0)}, "dmd_denoising_steps"),
        ({"dmd_denoising_steps": (999.5, 500.0)}, "dmd_denoising_steps"),
        ({"dmd_denoising_steps": (1001.0,)}, "dmd_denoising_steps"),
        ({"dmd_denoising_steps": ()}, "dmd_denoising_steps"),
        ({"guidance_scale": 5.0}, "guidance_scale"),
        ({"flow_shift": 0.0}, "flow_shift"),
    ],
)
def test_invalid_parameters_are_refused(path: Path, given: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        WanDMDSamplingParams.build({"prompt": "", **given}, Checkpoint.open(path))  # type: ignore[dict-item]
    assert caught.value.field == field
