"""A pipeline's wiring is checked when it is built."""

from __future__ import annotations

import pytest

from common.errors import CheckpointError
from common.pipeline import ComposedPipeline, PipelineError, ServiceSpec, StageSpec, check
from common.stage import Contract, compose_contracts
from models.pipelines.flux import FluxPipeline

GIVEN = {"prompt": "Prompt"}


def stage(
    name: str,
    inputs: dict[str, str],
    outputs: dict[str, str],
    *,
    service: str = "",
    optional: tuple[str, ...] = (),
    modules: tuple[str, ...] = (),
) -> StageSpec:
    contract = Contract(name, inputs, outputs, frozenset(optional))
    return StageSpec(contract, service or name, f"nowhere:{name}", modules)


ENCODE = stage("encode", {"prompt": "Prompt"}, {"text": "Conditioning"})
DENOISE = stage(
    "denoise", {"text": "Conditioning", "image": "Conditioning"}, {"latents": "Latents"}, optional=("image",)
)
IMAGE = stage("look", {"prompt": "Prompt"}, {"image": "Conditioning"})
DECODE = stage("decode", {"latents": "Latents"}, {"media": "Media"})


def problems(*stages: StageSpec, wanted: tuple[str, ...] = ("media",)) -> str:
    """What check() says of stages in services of their own; empty when they compose."""
    services = [ServiceSpec(each.service, each.contract, (each,)) for each in stages]
    try:
        check(services, given=GIVEN, wanted=wanted)
    except PipelineError as error:
        return str(error)
    return ""


def test_stages_that_compose_pass() -> None:
    assert problems(ENCODE, DENOISE, DECODE) == ""
    assert problems(ENCODE, IMAGE, DENOISE, DECODE) == ""


def test_a_missing_producer() -> None:
    assert problems(DENOISE, DECODE) == "denoise reads 'text', which no earlier stage writes"


def test_a_wrong_order() -> None:
    assert problems(DENOISE, ENCODE, DECODE) == "denoise reads 'text', which no earlier stage writes"


def test_an_optional_slot_that_comes_too_late() -> None:
    """Otherwise the reader would wait for a writer that waits for it."""
    assert problems(ENCODE, DENOISE, IMAGE, DECODE) == "denoise reads 'image', which no earlier stage writes"


def test_a_stage_that_reads_what_it_writes() -> None:
    assert "draw reads 'text'" in problems(stage("draw", {"text": "Conditioning"}, {"text": "Conditioning"}), wanted=())


def test_a_wrong_type() -> None:
    other = stage("decode", {"latents": "Media"}, {"media": "Media"})
    assert problems(ENCODE, DENOISE, other) == "decode reads 'latents' as Media, but it is Latents"


def test_a_double_write() -> None:
    assert problems(ENCODE, ENCODE, DENOISE, DECODE) == "encode writes 'text', which is already written"
    assert "'prompt', which is already written" in problems(stage("shout", {}, {"prompt": "Prompt"}), wanted=())


def test_a_result_that_nobody_makes() -> None:
    assert problems(ENCODE, DENOISE) == "nothing writes 'media', which the caller wants"


def test_all_problems_are_told_at_once() -> None:
    assert problems(DENOISE).count(";") == 1


class Sketch(ComposedPipeline):
    """A pipeline of the stages that a test sets."""

    pipeline_name = "Sketch"
    _required_config_modules = ("vae",)
    stages: tuple[StageSpec, ...] = ()

    def create_pipeline_stages(self) -> None:
        for each in self.stages:
            self.add_stage(each)


def sketch(*stages: StageSpec, modules: tuple[str, ...] = ("vae",)) -> ComposedPipeline:
    class Drawn(Sketch):
        pass

    Drawn.stages = stages
    return Drawn(modules)


def test_building_checks_the_wiring() -> None:
    assert [spec.service for spec in sketch(ENCODE, DENOISE, DECODE).services] == ["encode", "denoise", "decode"]
    with pytest.raises(PipelineError, match="nothing writes 'media'"):
        sketch(ENCODE)
    with pytest.raises(PipelineError, match="defines no stages"):
        ComposedPipeline.create_pipeline_stages(sketch(ENCODE, DENOISE, DECODE))


def test_a_checkpoint_without_a_required_module_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"Sketch needs the modules vae; model_index\.json lacks vae"):
        sketch(ENCODE, DENOISE, DECODE, modules=("transformer",))


def test_a_stage_is_built_with_modules_that_are_there() -> None:
    decode = stage("decode", {"latents": "Latents"}, {"media": "Media"}, modules=("vae", "scheduler"))
    with pytest.raises(PipelineError, match="decode is built with scheduler, which is no module"):
        sketch(ENCODE, DENOISE, decode)
    pipeline = sketch(ENCODE, DENOISE, decode, modules=("vae", "scheduler"))
    assert pipeline.service("decode").modules == ("vae", "scheduler")


def test_stages_of_one_service_stand_together() -> None:
    first = stage("encode", {"prompt": "Prompt"}, {"text": "Conditioning"}, service="worker", modules=("vae",))
    second = stage("denoise", {"text": "Conditioning"}, {"latents": "Latents"}, service="worker", modules=("vae",))
    spec = sketch(first, second, DECODE).service("worker")
    assert spec.modules == ("vae",)
    assert (spec.contract.inputs, set(spec.contract.outputs)) == ({"prompt": "Prompt"}, {"text", "latents"})
    apart = stage("decode", {"latents": "Latents"}, {"media": "Media"}, service="worker")
    with pytest.raises(PipelineError, match="the stages of worker are not consecutive"):
        sketch(first, IMAGE, second, apart)


def test_a_service_that_is_not_used_is_refused_with_those_that_are() -> None:
    with pytest.raises(PipelineError, match="Sketch has no image_encoding service; it has encode, denoise, decode"):
        sketch(ENCODE, DENOISE, DECODE).service("image_encoding")


def test_an_input_is_optional_only_if_every_reader_says_so() -> None:
    needs = Contract("needs", {"image": "Conditioning"}, {})
    may = Contract("may", {"image": "Conditioning"}, {}, frozenset({"image"}))
    assert compose_contracts("both", [may, may]).optional == {"image"}
    assert compose_contracts("both", [may, needs]).optional == frozenset()


def test_flux_runs_its_encoders_beside_its_preparation() -> None:
    pipeline = FluxPipeline(FluxPipeline._required_config_modules)
    text, preparation = pipeline.service("text_encoding").contract, pipeline.service("latent_preparation").contract
    assert not preparation.inputs.keys() & text.outputs.keys()
    assert set(pipeline.service("denoising").contract.optional) == {
        "image_conditioning",
        "image_latents",
        "resume_from",
    }
