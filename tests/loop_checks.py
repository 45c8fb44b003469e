"""Checks of the denoising loop for every family. The loop's input comes from the family's own stages."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import pytest
import torch
from torch import Tensor

from common.artifacts import ImageInputs, ParamValue, StepCheckpoint
from common.codec import pack, unpack
from common.errors import Cancelled
from common.stage import Call
from common.tensors import TORCH
from local_fleet import NO_IMAGES, LocalFleet
from models.contracts import DenoisingInput
from models.loader import load_module
from models.registry import resolve
from models.runtime import Runtime
from models.stages.denoising import DenoisingStage
from models.validation import InputValidationStage
from models.warm_up import STEPS, WarmUp
from step_checkpoints import step_checkpoints_to


def denoising_input(
    fleet: LocalFleet, given: Mapping[str, ParamValue], images: Mapping[str, bytes] = NO_IMAGES
) -> DenoisingInput:
    """Run a request through all services before denoising; returns the denoising input."""
    validated = InputValidationStage(fleet.model).run(given, images)
    values: dict[str, Any] = dict(validated.artifacts)
    files = {role: torch.frombuffer(bytearray(data), dtype=torch.uint8) for role, data in images.items()}
    values["image_inputs"] = ImageInputs(images=files)
    for spec in takewhile(lambda spec: spec.service != "denoising", validated.variant.services):
        stages = fleet.services[spec.service].of(validated.variant.name)
        values |= stages.run({slot: values[slot] for slot in stages.contract.inputs if slot in values}, Call("test"))
    slots = DenoisingInput.__dataclass_fields__
    return DenoisingInput(**{slot: value for slot, value in values.items() if slot in slots})


def denoising_stage(fleet: LocalFleet, runtime: Runtime, variant: str = "") -> DenoisingStage:
    """The denoising stage, with newly loaded modules."""
    served = fleet.model.variant(variant)
    assert served is not None, "the model has the variant"
    config = resolve(served.pipeline_config).from_checkpoint(fleet.model.checkpoint)
    modules = {
        name: load_module(fleet.model.checkpoint, name, config, runtime) for name in ("transformer", "scheduler")
    }
    return DenoisingStage(config, runtime, modules)


def denoised(stage: DenoisingStage, x: DenoisingInput, states: list[StepCheckpoint] | None = None) -> dict[str, Tensor]:
    """Run the loop; returns its result by latent part, and appends step checkpoints to `states`."""
    call = Call("test") if states is None else Call("test", on_item=step_checkpoints_to(states.append))
    return {part: each.latents for part, each in stage.run(x, call).denoised_latents.parts.items()}


def check_resume(fleet: LocalFleet, x: DenoisingInput, variant: str = "") -> None:
    """Check that a loop resumed after any step returns the same bytes. Step checkpoints are serialized and parsed."""
    states: list[StepCheckpoint] = []
    stage = denoising_stage(fleet, Runtime(step_checkpoint_every=1), variant)
    uninterrupted = denoised(stage, x, states)
    assert [state.step for state in states] == [*range(1, x.sampling.num_inference_steps)]
    for state in states:
        sent = unpack("state", StepCheckpoint, pack("state", state, TORCH), TORCH)
        resumed = denoised(stage, DenoisingInput(**vars(x) | {"resume_from": sent}))
        assert all(torch.equal(resumed[part], each) for part, each in uninterrupted.items()), state.step


def check_cancel(fleet: LocalFleet, x: DenoisingInput, variant: str = "") -> None:
    """Check that a cancellation ends the loop within one step."""
    recorded: list[int] = []

    def on_progress(step: int, _: int) -> None:
        recorded.append(step)
        if step == 2:
            call.cancelled.set()

    call = Call("test", on_progress=on_progress)
    with pytest.raises(Cancelled):
        denoising_stage(fleet, Runtime(), variant).run(x, call)
    assert recorded == [1, 2]


def check_warm_up(fleet: LocalFleet, size: str) -> None:
    """Check that a warm-up runs the loop. `size` is a --warm-up value; SIZE@VARIANT selects a variant."""
    steps: list[int] = []
    call = Call("warm-up", on_progress=lambda step, _: steps.append(step))
    variant = size.partition("@")[2]
    WarmUp.parse(fleet.model, (size,)).run(fleet.services["denoising"].of(variant).run, torch.float32, call)
    assert steps == [*range(1, STEPS + 1)]
