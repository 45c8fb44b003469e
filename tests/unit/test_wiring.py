"""Slots that a coordinator supplies to a service and reads from it, and workers that fit them."""

from __future__ import annotations

import json

import pytest

from common.pipeline import ServiceSpec, StageSpec
from common.stage import Contract
from common.wiring import Wiring, contract_of, contract_text, fault_of, older_text, wirings_of
from contracts import READ, SUPPLIED, WIRING, contract, worker_with


def spec(service: str, *stages: StageSpec) -> ServiceSpec:
    inputs = {slot: kind for stage in stages for slot, kind in stage.contract.inputs.items()}
    outputs = {slot: kind for stage in stages for slot, kind in stage.contract.outputs.items()}
    optional = frozenset[str]().union(*(stage.contract.optional for stage in stages))
    return ServiceSpec(service, Contract(service, inputs, outputs, optional), stages)


def stage(service: str, contract: Contract, result: str | None = None) -> StageSpec:
    return StageSpec(contract, service, "none:Stage", result=result)


def test_the_wiring_has_slots_that_are_always_supplied_and_slots_that_are_read() -> None:
    encoding = Contract("a", {"prompt": "Prompt"}, {"embeds": "Conditioning", "inner": "Latents"})
    drawing = Contract(
        "b",
        {"embeds": "Conditioning", "resume_from": "DenoiseState", "image_inputs": "ImageInputs"},
        {"media": "Media"},
        frozenset({"resume_from", "image_inputs"}),
    )
    services = (spec("encoding", stage("encoding", encoding)), spec("drawing", stage("drawing", drawing, "media")))
    assert wirings_of("text", services, {"prompt": None}) == {
        "encoding": Wiring("text", {"prompt": "Prompt"}, {"embeds": "Conditioning"}),
        "drawing": Wiring("text", {"embeds": "Conditioning"}, {"media": "Media"}),
    }
    with_images = wirings_of("image", services, {"prompt": None, "image_inputs": None})["drawing"]
    assert with_images.supplied == {"embeds": "Conditioning", "image_inputs": "ImageInputs"}


def test_a_narrowed_service_writes_only_slots_that_are_read() -> None:
    whole = spec("denoising", stage("denoising", contract(outputs={**READ, "inner": "Latents"})))
    narrowed = WIRING.narrow(whole)
    assert narrowed.contract.outputs == READ
    assert narrowed.contract.inputs == whole.contract.inputs


@pytest.mark.parametrize(
    ("announced", "wiring", "fault"),
    [
        (contract(), WIRING, ""),
        (contract(inputs={**SUPPLIED, "more": "Latents"}, optional={"more"}), WIRING, ""),
        (contract(inputs={"canvas": "Canvas"}), WIRING, ""),
        (contract(outputs={**READ, "more": "Latents"}), WIRING, ""),
        (
            contract(inputs={**SUPPLIED, "more": "Latents"}),
            WIRING,
            "input 'more': the worker requires Latents, the coordinator supplies none",
        ),
        (
            contract(inputs={"canvas": "Prompt"}),
            WIRING,
            "input 'canvas': the worker reads Prompt, the coordinator supplies Canvas",
        ),
        (
            contract(inputs={"canvas": "Prompt"}, optional={"canvas"}),
            WIRING,
            "input 'canvas': the worker reads Prompt, the coordinator supplies Canvas",
        ),
        (contract(outputs={}), WIRING, "output 'latents': the coordinator reads Latents, the worker writes none"),
        (
            contract(outputs={"latents": "Media"}),
            WIRING,
            "output 'latents': the coordinator reads Latents, the worker writes Media",
        ),
        (
            contract(),
            Wiring("", {**SUPPLIED, "blocks": "Stream[Latents]"}, READ),
            "input 'blocks': the coordinator supplies Stream[Latents], the worker reads none",
        ),
    ],
)
def test_a_worker_fits_unless_a_slot_is_at_fault(announced: Contract, wiring: Wiring, fault: str) -> None:
    assert fault_of(worker_with(announced), wiring) == fault
    assert fault_of(worker_with({"": announced}), wiring) == fault


def test_each_variant_has_its_own_contract() -> None:
    needing = contract(inputs={**SUPPLIED, "image_conditioning": "Conditioning"})
    worker = worker_with({"text": contract(), "image": needing})
    assert not worker.contract.inputs.keys() - needing.inputs.keys()
    assert fault_of(worker, Wiring("text", SUPPLIED, READ)) == ""
    assert "image_conditioning" in fault_of(worker, Wiring("image", SUPPLIED, READ))
    assert fault_of(worker, Wiring("", SUPPLIED, READ)) == ""  # the first variant
    assert fault_of(worker, Wiring("video", SUPPLIED, READ)) == "variant 'video': the worker serves only text, image"
    assert contract_of(worker, "video") is None
    lone = fault_of(worker_with({"": contract()}), Wiring("image", SUPPLIED, READ))
    assert lone == "variant 'image': the worker serves only one variant without a name"


def test_a_worker_that_announces_no_contract_fits_every_wiring() -> None:
    worker = worker_with(contract())
    worker.ClearField("contract")
    assert fault_of(worker, WIRING) == contract_text(worker) == ""


def test_the_contract_text_for_the_last_release_has_the_form_that_the_release_compares() -> None:
    text = older_text(worker_with({"text": contract(), "image": contract(outputs={**READ, "more": "Media"})}))
    assert text == (
        '{"inputs":{"canvas":"Canvas","schedule":"Schedule"},"optional":[],"optional_outputs":["more"],'
        '"outputs":{"latents":"Latents","more":"Media"}}'
    )
    assert "optional_outputs" not in json.loads(older_text(worker_with(contract())))


def test_equal_wirings_have_one_digest() -> None:
    assert WIRING.digest == Wiring("", dict(reversed(SUPPLIED.items())), READ).digest
    assert WIRING.digest != Wiring("image", SUPPLIED, READ).digest
    assert len(WIRING.digest) == 16
