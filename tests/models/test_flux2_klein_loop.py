"""FLUX.2 klein: byte-equal resume, cancellation, warnings, and refused parameters and modules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.artifacts import Canvas, Sampling, StepCheckpoint
from common.checkpoint import Checkpoint
from common.codec import pack, unpack
from common.errors import Cancelled, CheckpointError, InvalidInput
from common.stage import Call
from common.tensors import TORCH
from configs.pipeline_configs.flux2_klein import Flux2KleinImagePipelineConfig, Flux2KleinPipelineConfig
from configs.sample.flux2_klein import Flux2KleinSamplingParams
from models.catalog import open_model
from models.contracts import DenoisingInput
from models.loader import load_module
from models.registry import load_registry
from models.runtime import Runtime
from models.stages.denoising import DenoisingStage
from parallel_cases import FAMILIES, draw_input
from step_checkpoints import step_checkpoints_to
from tiny_flux2 import build_tiny_flux2_klein

STEPS = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return build_tiny_flux2_klein(tmp_path_factory.mktemp("flux2") / "klein")


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Checkpoint:
    return open_model(str(path), load_registry()).checkpoint


@pytest.fixture(scope="module")
def x(checkpoint: Checkpoint) -> DenoisingInput:
    config = Flux2KleinImagePipelineConfig.from_checkpoint(checkpoint)
    return draw_input(checkpoint, config, FAMILIES["flux2-klein"])


def changed(path: Path, to: Path, file: str, **entries: Any) -> Path:
    """Copy the checkpoint and change entries in one of its files."""
    shutil.copytree(path, to)
    values = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps(values | entries))
    return to


def stage(checkpoint: Checkpoint) -> DenoisingStage:
    config, runtime = Flux2KleinImagePipelineConfig.from_checkpoint(checkpoint), Runtime(step_checkpoint_every=1)
    modules = {name: load_module(checkpoint, name, config, runtime) for name in ("transformer", "scheduler")}
    return DenoisingStage(config, runtime, modules)


def loop(checkpoint: Checkpoint, x: DenoisingInput, call: Call) -> Tensor:
    return stage(checkpoint).run(x, call).denoised_latents.parts["image"].latents


def test_a_loop_resumes_after_every_step_to_the_same_bytes(checkpoint: Checkpoint, x: DenoisingInput) -> None:
    """With two reference images; step checkpoints are serialized and parsed, as between workers."""
    assert x.image_latents is not None
    assert x.image_latents.parts.keys() == {"condition", "condition_1"}
    states: list[StepCheckpoint] = []
    whole = loop(checkpoint, x, Call("test", on_item=step_checkpoints_to(states.append)))
    assert [state.step for state in states] == [*range(1, STEPS)]
    for state in states:
        sent = unpack("state", StepCheckpoint, pack("state", state, TORCH), TORCH)
        resumed = loop(checkpoint, DenoisingInput(**vars(x) | {"resume_from": sent}), Call("test"))
        assert torch.equal(resumed, whole), state.step


def test_cancellation_ends_the_loop_after_the_current_step(checkpoint: Checkpoint, x: DenoisingInput) -> None:
    recorded: list[int] = []

    def on_progress(step: int, _: int) -> None:
        recorded.append(step)
        call.cancelled.set()

    call = Call("test", on_progress=on_progress)
    with pytest.raises(Cancelled):
        loop(checkpoint, x, call)
    assert recorded == [1]


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({}, []),
        ({"height": 79, "width": 64}, ["height"]),
        ({"negative_prompt": "a car"}, ["negative_prompt"]),
        ({"sigmas": (1.0, 0.5), "num_inference_steps": 9}, ["num_inference_steps"]),
        ({"sigmas": (1.0, 0.5), "shift_steps": 9}, []),
        ({"shift_steps": 9}, ["shift_steps"]),
    ],
)
def test_warnings_name_the_affected_parameters(
    checkpoint: Checkpoint, given: dict[str, Any], fields: list[str]
) -> None:
    params, warnings = Flux2KleinSamplingParams.build({"prompt": "", **given}, checkpoint)
    assert [warning.field for warning in warnings] == fields
    assert params.negative_prompt is None
    assert params.branches == 2


def test_a_distilled_model_ignores_guidance_with_a_warning(path: Path, tmp_path: Path) -> None:
    distilled = Checkpoint.open(changed(path, tmp_path / "distilled", "model_index.json", is_distilled=True))
    params, warnings = Flux2KleinSamplingParams.build({"prompt": "", "guidance_scale": 4.0}, distilled)
    assert [warning.field for warning in warnings] == ["guidance_scale"]
    assert params.branches == Flux2KleinSamplingParams.build({"prompt": ""}, distilled)[0].branches == 1


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"height": 15}, "height"),
        ({"max_sequence_length": 513}, "max_sequence_length"),
        ({"sigmas": (0.5, 1.0)}, "sigmas"),
    ],
)
def test_invalid_parameters_are_refused(checkpoint: Checkpoint, given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Flux2KleinSamplingParams.build({"prompt": "", **given}, checkpoint)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("model_index.json", {"is_distilled": "yes"}, "is_distilled: 'yes' is not true or false"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds: True is not False"),
        ("transformer/config.json", {"joint_attention_dim": 47}, "text_encoder: 48 text features are not 47"),
        ("text_encoder/config.json", {"num_hidden_layers": 26}, "num_hidden_layers: 26 is not"),
        ("vae/config.json", {"latent_channels": 4}, "the VAE's 4 latent channels"),
    ],
)
def test_inconsistent_modules_are_refused(
    path: Path, tmp_path: Path, file: str, entries: dict[str, Any], message: str
) -> None:
    bad = Checkpoint.open(changed(path, tmp_path / "bad", file, **entries))
    with pytest.raises(CheckpointError, match=message):
        Flux2KleinPipelineConfig.from_checkpoint(bad)


def test_a_missing_module_is_refused(path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(path, tmp_path / "copy")
    shutil.rmtree(copy / "vae")
    with pytest.raises(CheckpointError, match="vae"):
        open_model(str(copy), load_registry())


def test_the_shift_of_a_large_image_does_not_depend_on_the_step_count(checkpoint: Checkpoint) -> None:
    config = Flux2KleinPipelineConfig.from_checkpoint(checkpoint)
    few, many = (Sampling(num_inference_steps=steps, seed=0) for steps in (4, 50))
    large, small = Canvas(height=1056, width=1056), Canvas(height=1024, width=1024)
    assert config.mu_of_steps(large, few) == config.mu_of_steps(large, many) == config.mu(large)
    assert config.mu_of_steps(small, few) > config.mu_of_steps(small, many)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"sigmas": (1.0, 0.5)}, 50),
        ({"sigmas": (1.0, 0.5), "num_inference_steps": 9}, 9),
        ({"sigmas": (1.0, 0.5), "num_inference_steps": 9, "shift_steps": 7}, 7),
        ({"num_inference_steps": 9, "shift_steps": 7}, 9),
    ],
)
def test_the_shift_depends_on_the_requested_step_count(
    checkpoint: Checkpoint, given: dict[str, Any], steps: int
) -> None:
    """The shift is the same when the request is rebuilt from its parameters."""
    config = Flux2KleinPipelineConfig.from_checkpoint(checkpoint)
    expected = config.mu_of_steps(Canvas(height=1024, width=1024), Sampling(num_inference_steps=steps, seed=0))
    params, _ = Flux2KleinSamplingParams.build({"prompt": "", "height": 1024, "width": 1024, **given}, checkpoint)
    rebuilt, _ = Flux2KleinSamplingParams.build(params.as_mapping(), checkpoint)
    assert rebuilt == params
    for each in (params, rebuilt):
        artifacts = each.artifacts()
        canvas, sampling = artifacts["canvas"], artifacts["sampling"]
        assert isinstance(canvas, Canvas)
        assert isinstance(sampling, Sampling)
        assert config.mu_of_steps(canvas, sampling) == expected
