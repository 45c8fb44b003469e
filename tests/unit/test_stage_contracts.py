"""Contracts of stages are derived from their input and output types, and progress reaches the caller."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any

import pytest

from common.artifacts import Canvas, Media, Prompt
from common.errors import Cancelled, InternalError
from common.local import HostedStages
from common.stage import RESUME, Call, Contract, PipelineStage, derive_contract
from models import contracts

if TYPE_CHECKING:
    from common.artifacts import Latents


@dataclass(frozen=True, kw_only=True)
class DrawInput:
    prompt: Prompt
    canvas: Canvas | None = None


@dataclass(frozen=True, kw_only=True)
class DrawOutput:
    # Latents is imported for type checking only: a contract needs only the text of the annotation.
    latents: Latents


class DrawStage(PipelineStage[DrawInput, DrawOutput]):
    """Returns its inputs as latents."""

    def run(self, x: DrawInput, call: Call) -> DrawOutput:
        """Report one step."""
        call.progress(1, 1)
        received: Any = (x.prompt.prompt, x.canvas)
        return DrawOutput(latents=received)


class RedrawStage(DrawStage):
    """A stage that derives from another stage."""


def test_a_contract_is_derived_from_the_types() -> None:
    expected = Contract(
        "DrawStage", {"prompt": "Prompt", "canvas": "Canvas"}, {"latents": "Latents"}, frozenset({"canvas"})
    )
    assert DrawStage.contract == expected
    assert (DrawStage.Input, DrawStage.Output) == (DrawInput, DrawOutput)
    assert RedrawStage.contract is DrawStage.contract


def test_evaluated_annotations_give_the_same_contract() -> None:
    inputs = make_dataclass("Inputs", [("prompt", Prompt)])
    outputs = make_dataclass("Outputs", [("media", Media)])
    assert derive_contract("stage", inputs, outputs) == Contract("stage", {"prompt": "Prompt"}, {"media": "Media"})


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (
            make_dataclass("Inputs", [("state", "DenoiseState", field(metadata=RESUME))]),
            DrawOutput,
            "Inputs: resume slot state is not a single, optional field; a stage has at most one resume slot",
        ),
        (
            make_dataclass("Inputs", [("prompts", "list[Prompt]")]),
            Media,
            r"Inputs\.prompts: 'list\[Prompt\]' is not an",
        ),
        (int, DrawOutput, "int is not a dataclass of artifacts"),
    ],
)
def test_types_that_are_not_slots_are_refused(inputs: type[Any], outputs: type[Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        derive_contract("stage", inputs, outputs)


def test_the_standard_contracts_write_every_slot_once() -> None:
    standard = [
        contracts.TEXT_ENCODING,
        contracts.LATENT_PREPARATION,
        contracts.TIMESTEP_PREPARATION,
        contracts.DENOISING,
        contracts.DECODING,
    ]
    written = [slot for contract in standard for slot in contract.outputs]
    assert len(set(written)) == len(written)


@dataclass(frozen=True, kw_only=True)
class RollOutput:
    latents: Latents
    dice: Prompt | None = None


class RollStage(PipelineStage[DrawInput, RollOutput]):
    """Writes the slot `dice` if its pipeline reads it."""

    def run(self, x: DrawInput, call: Call) -> RollOutput:
        """Return the request ID as latents and, if the slot is written, the prompt as dice."""
        latents: Any = call.request_id
        return RollOutput(latents=latents, dice=x.prompt if self.writes("dice") else None)


def test_a_stage_writes_the_optional_outputs_that_its_contract_has() -> None:
    assert RollStage.contract.optional_outputs == {"dice"}
    slots = {"prompt": Prompt(prompt="red"), "canvas": Canvas(height=8, width=8)}
    both = HostedStages("roll", [RollStage()]).run(slots, Call("test"))
    assert both == {"latents": "test", "dice": Prompt(prompt="red")}
    bound = RollStage().bind(RollStage.contract.reading().writing(()))
    hosted = HostedStages("roll", [bound])
    assert (set(hosted.contract.inputs), set(hosted.contract.outputs)) == ({"prompt"}, {"latents"})
    assert hosted.run(slots, Call("test")) == {"latents": "test"}
    assert RollStage.contract.outputs.keys() == {"latents", "dice"}


class IncompleteStage(RollStage):
    """Omits an output that its pipeline reads."""

    def writes(self, slot: str) -> bool:
        """Return False for every slot, so that run() omits `dice`."""
        return not slot


def test_a_stage_that_omits_an_output_that_is_read_fails() -> None:
    with pytest.raises(InternalError, match="RollStage did not return dice"):
        HostedStages("roll", [IncompleteStage()]).run({"prompt": Prompt(prompt="red")}, Call("test"))


def test_reading_removes_unnamed_optional_inputs_except_the_resume_slot() -> None:
    whole = contracts.DENOISING
    assert whole.resume_slot == "resume_from"
    assert whole.reading().optional == {"resume_from"}
    assert whole.reading("image_latents").optional == {"image_latents", "resume_from"}
    assert whole.reading("image_latents").inputs.keys() - whole.reading().inputs.keys() == {"image_latents"}
    with pytest.raises(ValueError, match="canvas is not an optional input; optional inputs are image_conditioning"):
        whole.reading("canvas")


def test_a_stage_is_bound_only_to_a_part_of_its_contract() -> None:
    part = RollStage.contract.reading("canvas").writing(())
    assert RollStage().bind(part).contract is part
    for other in (
        Contract("other", {"prompt": "Prompt", "schedule": "Schedule"}, {"latents": "Latents"}),
        Contract("other", {}, {"latents": "Latents"}),
        Contract("other", {"prompt": "Prompt"}, {}),
        Contract("other", {"prompt": "Prompt"}, {"latents": "Conditioning"}),
    ):
        with pytest.raises(ValueError, match="other is not part of the contract of RollStage"):
            RollStage().bind(other)


def test_hosted_stages_omit_absent_inputs_and_end_when_cancelled() -> None:
    hosted = HostedStages("draw", [DrawStage()])
    steps: list[tuple[int, int]] = []
    call = Call("test", on_progress=lambda step, total: steps.append((step, total)))
    assert hosted.run({"prompt": Prompt(prompt="red")}, call) == {"latents": ("red", None)}
    assert steps == [(1, 1)]
    call.cancelled.set()
    with pytest.raises(Cancelled, match="request test was cancelled"):
        hosted.run({"prompt": Prompt(prompt="red")}, call)
    assert steps == [(1, 1)]
