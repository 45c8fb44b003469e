"""A plugin family runs through the same catalog, loader and pipeline as the built-in families."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.artifacts import Canvas, ParamValue, Prompt, Sampling, StepCheckpoint
from common.errors import CheckpointError
from common.stage import Call
from local_fleet import NO_IMAGES, LocalFleet, RecordedCall
from models.catalog import open_model
from models.registry import Registry, load_registry
from step_checkpoints import step_checkpoints_to
from toy_checkpoint import build_toy_checkpoint, toy_family


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with toy_family(tmp_path_factory.mktemp("toy") / "plugins") as plugins:
        yield load_registry([plugins])


@pytest.fixture(scope="module")
def fleet(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(open_model(str(build_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")), registry))
    yield fleet
    fleet.close()


def test_each_parameter_changes_the_image_and_a_repeated_request_does_not(fleet: LocalFleet) -> None:
    first = fleet.tensors(prompt="red", seed=1)
    assert torch.equal(fleet.tensors(prompt="red", seed=1)["pixels"], first["pixels"])
    assert first["pixels"].shape == (1, 3, 32, 32)
    changes: list[dict[str, ParamValue]] = [
        {"prompt": "blue"},
        {"seed": 2},
        {"contrast": 3.0},
        {"num_inference_steps": 5},
    ]
    for change in changes:
        given: dict[str, ParamValue] = {"prompt": "red", "seed": 1, **change}
        assert not torch.equal(fleet.tensors(None, NO_IMAGES, **given)["pixels"], first["pixels"]), change
    images = fleet.images(prompt="red", seed=1, num_outputs_per_prompt=2, width=40)
    assert [image.size for image in images] == [(40, 32)] * 2


def test_warnings_and_progress_are_reported(fleet: LocalFleet) -> None:
    recorded = RecordedCall()
    fleet.media(recorded, prompt="x" * 65, seed=1)
    assert recorded.warnings == [("prompt", "only the first 64 of 65 bytes are read")]
    assert recorded.progress[-5:] == [(1, 4), (2, 4), (3, 4), (4, 4), (1, 1)]


def test_a_loop_resumes_after_every_step_to_the_same_bytes(fleet: LocalFleet) -> None:
    states: list[StepCheckpoint] = []
    canvas, sampling = Canvas(height=32, width=32), Sampling(num_inference_steps=4, seed=1, params={"contrast": 1.0})
    plain_call = Call("toy")
    inputs = {
        **fleet.services["text_encoding"].run({"prompt": Prompt(prompt="red"), "sampling": sampling}, plain_call),
        **fleet.services["latent_preparation"].run({"canvas": canvas, "sampling": sampling}, plain_call),
        "canvas": canvas,
        "sampling": sampling,
    }
    denoising = fleet.services["denoising"]
    slots = {name: inputs[name] for name in denoising.contract.inputs if name in inputs}
    whole = denoising.run(slots, Call("toy", on_item=step_checkpoints_to(states.append)))["denoised_latents"]
    assert [state.step for state in states] == [1, 2, 3, 4]
    for state in states:
        resumed = denoising.run({**slots, "resume_from": state}, plain_call)["denoised_latents"]
        assert torch.equal(resumed.parts["image"].latents, whole.parts["image"].latents)


def test_a_module_class_without_a_loader_is_refused(registry: Registry, tmp_path: Path) -> None:
    path = build_toy_checkpoint(tmp_path / "checkpoint")
    index = path / "model_index.json"
    index.write_text(index.read_text().replace("ToyTransformer", "OtherTransformer"))
    with pytest.raises(CheckpointError, match=r"OtherTransformer is not supported; supported: .*ToyTransformer"):
        LocalFleet(open_model(str(path), registry))
