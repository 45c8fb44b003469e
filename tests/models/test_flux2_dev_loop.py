"""FLUX.2 dev: byte-equal resume, cancellation, warnings, and refused parameters and modules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coarse_images import coarse_image, png
from common.artifacts import StepCheckpoint
from common.checkpoint import Checkpoint
from common.codec import pack, unpack
from common.errors import Cancelled, CheckpointError, InvalidInput
from common.image_header import read_image_header
from common.stage import Call
from common.tensors import TORCH
from configs.pipeline_configs.flux2_dev import Flux2ImagePipelineConfig, Flux2PipelineConfig
from configs.sample.flux2 import Flux2ImageSamplingParams, Flux2SamplingParams
from models.catalog import open_model
from models.contracts import DenoisingInput
from models.loader import load_module, load_stages
from models.registry import load_registry
from models.runtime import Runtime
from models.stages.denoising import DenoisingStage
from parallel_cases import FAMILIES, draw_input
from step_checkpoints import step_checkpoints_to
from tiny_flux2 import build_tiny_flux2_dev

STEPS = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return build_tiny_flux2_dev(tmp_path_factory.mktemp("flux2") / "dev")


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Checkpoint:
    return open_model(str(path), load_registry()).checkpoint


@pytest.fixture(scope="module")
def loop(checkpoint: Checkpoint) -> Callable[[DenoisingInput, Call], Tensor]:
    """Run the loop with reference images and a step checkpoint after each step; returns the latents."""
    config, runtime = Flux2ImagePipelineConfig.from_checkpoint(checkpoint), Runtime(step_checkpoint_every=1)
    modules = {name: load_module(checkpoint, name, config, runtime) for name in ("transformer", "scheduler")}
    stage = DenoisingStage(config, runtime, modules)
    return lambda x, call: stage.run(x, call).denoised_latents.parts["image"].latents


@pytest.fixture(scope="module")
def x(checkpoint: Checkpoint) -> DenoisingInput:
    config = Flux2ImagePipelineConfig.from_checkpoint(checkpoint)
    drawn = draw_input(checkpoint, config, FAMILIES["flux2-dev"])
    references = draw_input(checkpoint, config, FAMILIES["flux2-klein"]).image_latents
    return DenoisingInput(**vars(drawn) | {"image_latents": references})


def test_a_loop_resumes_after_every_step_to_the_same_bytes(
    loop: Callable[[DenoisingInput, Call], Tensor], x: DenoisingInput
) -> None:
    """Step checkpoints are serialized and parsed, as between workers."""
    states: list[StepCheckpoint] = []
    whole = loop(x, Call("test", on_item=step_checkpoints_to(states.append)))
    assert [state.step for state in states] == [*range(1, STEPS)]
    for state in states:
        sent = unpack("state", StepCheckpoint, pack("state", state, TORCH), TORCH)
        assert torch.equal(loop(DenoisingInput(**vars(x) | {"resume_from": sent}), Call("test")), whole), state.step


def test_cancellation_ends_the_loop_after_the_current_step(
    loop: Callable[[DenoisingInput, Call], Tensor], x: DenoisingInput
) -> None:
    recorded: list[int] = []

    def on_progress(step: int, _: int) -> None:
        recorded.append(step)
        call.cancelled.set()

    call = Call("test", on_progress=on_progress)
    with pytest.raises(Cancelled):
        loop(x, call)
    assert recorded == [1]


@pytest.mark.parametrize("kind", [Flux2SamplingParams, Flux2ImageSamplingParams])
@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({}, []),
        ({"height": 79, "width": 64}, ["height"]),
        ({"negative_prompt": "a car"}, ["negative_prompt"]),
        ({"sigmas": (1.0, 0.5), "num_inference_steps": 9}, ["num_inference_steps"]),
        ({"shift_steps": 9}, ["shift_steps"]),
    ],
)
def test_warnings_name_the_affected_parameters(
    checkpoint: Checkpoint, kind: type[Flux2SamplingParams], given: dict[str, Any], fields: list[str]
) -> None:
    params, warnings = kind.build({"prompt": "", **given}, checkpoint)
    assert [warning.field for warning in warnings] == fields
    assert params.negative_prompt is None
    assert params.branches == 1
    assert (params.guidance_scale, params.width) == (4.0, given.get("width", 1024))
    assert params.num_inference_steps == (2 if "sigmas" in given else 50)


def test_only_an_explicit_size_is_rounded_with_a_warning(checkpoint: Checkpoint) -> None:
    header = read_image_header("image", png(coarse_image(100, 70)))
    for given, fields in (({}, []), ({"height": 79}, ["height"])):
        params, warnings = Flux2ImageSamplingParams.build({"prompt": "", **given}, checkpoint, {"image": header})
        assert (params.height, params.width) == (64, 96)
        assert [warning.field for warning in warnings] == fields


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"height": 15}, "height"),
        ({"max_sequence_length": 513}, "max_sequence_length"),
        ({"sigmas": (0.5, 1.0)}, "sigmas"),
        ({"caption_upsample_temperature": 0.15}, "caption_upsample_temperature"),
    ],
)
def test_invalid_parameters_are_refused(checkpoint: Checkpoint, given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Flux2SamplingParams.build({"prompt": "", **given}, checkpoint)
    assert caught.value.field == field


def changed(path: Path, to: Path, file: str, change: Callable[[dict[str, Any]], object]) -> Checkpoint:
    """Copy the checkpoint and change one of its JSON files."""
    shutil.copytree(path, to)
    values = json.loads((to / file).read_text())
    change(values)
    (to / file).write_text(json.dumps(values))
    return Checkpoint.open(to)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "transformer/config.json",
            lambda values: values.update(guidance_embeds=False),
            "guidance_embeds: False is not True",
        ),
        (
            "transformer/config.json",
            lambda values: values.update(joint_attention_dim=47),
            "text_encoder: 48 text features are not 47",
        ),
        (
            "text_encoder/config.json",
            lambda values: values["text_config"].update(num_hidden_layers=29),
            "num_hidden_layers: 29 is not",
        ),
        ("vae/config.json", lambda values: values.update(latent_channels=4), "the VAE's 4 latent channels"),
    ],
)
def test_inconsistent_modules_are_refused(
    path: Path, tmp_path: Path, file: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Flux2PipelineConfig.from_checkpoint(changed(path, tmp_path / "bad", file, change))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(path: Path, tmp_path: Path) -> None:
    def shrink(values: dict[str, Any]) -> None:
        values["text_config"]["vocab_size"] = 99

    with pytest.raises(CheckpointError, match=r"tokenizer has \d+ tokens, but text_encoder has embeddings for 99"):
        changed(path, tmp_path / "bad", "text_encoder/config.json", shrink)


def test_a_missing_module_is_refused(path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(path, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(CheckpointError, match="text_encoder"):
        open_model(str(copy), load_registry())


def test_the_encoder_is_loaded_without_its_vision_tower(path: Path) -> None:
    model = open_model(str(path), load_registry())
    (stage,) = load_stages(model, model.service("text_encoding"), Runtime())
    encoder: Any = vars(vars(stage)["_encoders"][0])["_encoder"]
    assert type(encoder).__name__ == "MistralModel"
