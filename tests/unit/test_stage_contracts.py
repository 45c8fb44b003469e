"""A stage's contract is read off its input and output types; what a call tells reaches its caller."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING, Any

import pytest

from common.artifacts import Canvas, Media, Prompt
from common.errors import Cancelled
from common.local import HostedStages
from common.stage import Call, Contract, PipelineStage, derive_contract
from models import contracts

if TYPE_CHECKING:
    from common.artifacts import Latents


@dataclass(frozen=True, kw_only=True)
class DrawInput:
    prompt: Prompt
    canvas: Canvas | None = None


@dataclass(frozen=True, kw_only=True)
class DrawOutput:
    # Never imported at run time: the annotation is enough.
    latents: Latents


class DrawStage(PipelineStage[DrawInput, DrawOutput]):
    """Writes down what it was given."""

    def run(self, x: DrawInput, call: Call) -> DrawOutput:
        """Tell one step."""
        call.progress(1, 1)
        words: Any = (x.prompt.prompt, x.canvas)
        return DrawOutput(latents=words)


class RedrawStage(DrawStage):
    """A stage may refine another one."""


def test_a_contract_is_derived_from_the_types() -> None:
    expected = Contract(
        "DrawStage", {"prompt": "Prompt", "canvas": "Canvas"}, {"latents": "Latents"}, frozenset({"canvas"})
    )
    assert DrawStage.contract == expected
    assert (DrawStage.Input, DrawStage.Output) == (DrawInput, DrawOutput)
    assert RedrawStage.contract is DrawStage.contract


def test_annotations_that_are_evaluated_count_the_same() -> None:
    inputs = make_dataclass("Inputs", [("prompt", Prompt)])
    outputs = make_dataclass("Outputs", [("media", Media)])
    assert derive_contract("stage", inputs, outputs) == Contract("stage", {"prompt": "Prompt"}, {"media": "Media"})


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (Prompt, make_dataclass("Outputs", [("media", "Media | None")]), "Outputs: outputs cannot be optional: media"),
        (
            make_dataclass("Inputs", [("prompts", "list[Prompt]")]),
            Media,
            r"Inputs\.prompts: 'list\[Prompt\]' is not an",
        ),
        (int, DrawOutput, "int must be a dataclass of artifacts"),
    ],
)
def test_types_that_are_no_slots_are_defects(inputs: type[Any], outputs: type[Any], message: str) -> None:
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


def test_hosted_stages_leave_out_what_is_absent_and_end_when_cancelled() -> None:
    hosted = HostedStages("draw", [DrawStage()])
    steps: list[tuple[int, int]] = []
    call = Call("test", on_progress=lambda step, total: steps.append((step, total)))
    assert hosted.run({"prompt": Prompt(prompt="red")}, call) == {"latents": ("red", None)}
    assert steps == [(1, 1)]
    call.cancelled.set()
    with pytest.raises(Cancelled, match="request test was cancelled"):
        hosted.run({"prompt": Prompt(prompt="red")}, call)
    assert steps == [(1, 1)]
