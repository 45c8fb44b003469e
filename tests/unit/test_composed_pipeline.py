"""A pipeline's wiring is checked when it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from common.errors import CheckpointError
from common.pipeline import ComposedPipeline, Cost, MissingModules, PipelineError, ServiceSpec, StageSpec, check
from common.stage import Contract, compose_contracts
from models.composition import StandardPipeline
from models.pipelines.flux import FluxPipeline
from models.pipelines.qwen_image_edit import QwenImageEditPipeline
from models.pipelines.wan import WanPipeline
from models.pipelines.wan_image_to_video import WanImageToVideoPipeline

GIVEN = {"prompt": "Prompt"}
NO_MODULES: Mapping[str, str] = MappingProxyType({})


def stage(
    name: str,
    inputs: dict[str, str],
    outputs: dict[str, str],
    *,
    service: str = "",
    optional: tuple[str, ...] = (),
    optional_outputs: tuple[str, ...] = (),
    modules: Mapping[str, str] = NO_MODULES,
    **facts: Any,
) -> StageSpec:
    contract = Contract(name, inputs, outputs, frozenset(optional), frozenset(optional_outputs))
    return StageSpec(contract, service or name, f"nowhere:{name}", modules, **facts)


ENCODE = stage("encode", {"prompt": "Prompt"}, {"text": "Conditioning"})
DENOISE = stage(
    "denoise", {"text": "Conditioning", "image": "Conditioning"}, {"latents": "Latents"}, optional=("image",)
)
IMAGE = stage("look", {"prompt": "Prompt"}, {"image": "Conditioning"})
DECODE = stage("decode", {"latents": "Latents"}, {"media": "Media"}, result="media")
DRAW = stage("draw", {"prompt": "Prompt"}, {"noise": "Latents", "dice": "Generator"}, optional_outputs=("dice",))


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
    assert problems(ENCODE, DENOISE, wanted=("latents", "media")) == "nothing writes 'media', which the caller wants"


def test_an_output_that_nothing_reads() -> None:
    """Optional outputs, such as the generator here, may be unread: the pipeline leaves them out."""
    assert problems(ENCODE, DRAW, DENOISE, DECODE) == "draw writes 'noise', which nothing reads"


def test_all_problems_are_reported_at_once() -> None:
    assert problems(DENOISE).split("; ") == [
        "denoise reads 'text', which no earlier stage writes",
        "denoise writes 'latents', which nothing reads",
        "nothing writes 'media', which the caller wants",
    ]


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
    with pytest.raises(PipelineError, match="decode reads 'latents', which no earlier stage writes"):
        sketch(ENCODE, DECODE)
    with pytest.raises(PipelineError, match="defines no stages"):
        ComposedPipeline.create_pipeline_stages(sketch(ENCODE, DENOISE, DECODE))


def test_a_checkpoint_without_a_required_module_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"Sketch needs the modules vae; model_index\.json lacks vae"):
        sketch(ENCODE, DENOISE, DECODE, modules=("transformer",))


def test_a_stage_is_built_with_modules_that_are_there() -> None:
    decode = replace(DECODE, modules={"vae": "vae", "solver": "scheduler"})
    with pytest.raises(PipelineError, match="decode requires scheduler, which is not a module"):
        sketch(ENCODE, DENOISE, decode)
    pipeline = sketch(ENCODE, DENOISE, decode, modules=("vae", "scheduler"))
    service = pipeline.service("decode")
    assert service.modules == ("vae", "scheduler")
    assert [service.module_of(role) for role in ("vae", "solver", "scheduler")] == ["vae", "scheduler", None]
    assert pipeline.roles == {"vae": "vae", "solver": "scheduler"}
    other = replace(ENCODE, modules={"vae": "scheduler"})
    with pytest.raises(PipelineError, match="role 'vae' is assigned to scheduler and vae; a role has one module"):
        sketch(other, DENOISE, decode, modules=("vae", "scheduler"))


VAE = {"vae": "vae"}


def test_stages_of_one_service_stand_together() -> None:
    first = stage("encode", {"prompt": "Prompt"}, {"text": "Conditioning"}, service="worker", modules=VAE)
    second = stage("denoise", {"text": "Conditioning"}, {"latents": "Latents"}, service="worker", modules=VAE)
    spec = sketch(first, second, DECODE).service("worker")
    assert spec.modules == ("vae",)
    assert (spec.contract.inputs, set(spec.contract.outputs)) == ({"prompt": "Prompt"}, {"text", "latents"})
    apart = replace(DECODE, service="worker")
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


def test_facts_of_a_service_are_those_of_its_stages() -> None:
    first = stage("encode", {"prompt": "Prompt"}, {"text": "Conditioning"}, service="worker", cost=Cost.PIXEL)
    contract = Contract(
        "denoise",
        {"text": "Conditioning", "stopped_at": "DenoiseState"},
        {"latents": "Latents"},
        frozenset({"stopped_at"}),
        resume_slot="stopped_at",
    )
    second = StageSpec(contract, "worker", "nowhere:denoise", cost=Cost.PIXEL_STEP, reports_steps=True)
    both, decode = sketch(first, second, DECODE).services
    assert (both.cost, both.reports_steps, both.resume_slot) == (Cost.PIXEL_STEP, True, "stopped_at")
    assert (decode.cost, decode.reports_steps, decode.resume_slot) == (Cost.REQUEST, False, None)
    third = replace(first, contract=replace(first.contract, resume_slot="text"))
    with pytest.raises(PipelineError, match="worker has several resumable stages, encode, denoise"):
        sketch(third, second, DECODE)


def test_a_pipeline_has_one_result() -> None:
    with pytest.raises(PipelineError, match=r"results \[\] are declared; a pipeline has exactly one"):
        sketch(ENCODE, DENOISE, replace(DECODE, result=None))
    with pytest.raises(PipelineError, match=r"results \['latents', 'media'\] are declared"):
        sketch(ENCODE, replace(DENOISE, result="latents"), DECODE)
    with pytest.raises(PipelineError, match="decode: result 'video' is not one of its outputs"):
        replace(DECODE, result="video")


def test_an_optional_output_is_left_out_unless_a_later_stage_reads_it() -> None:
    denoise = stage("denoise", {"noise": "Latents"}, {"latents": "Latents"})
    draw, *_ = sketch(DRAW, denoise, DECODE).services
    assert (draw.contract.outputs, draw.stages[0].contract.outputs) == ({"noise": "Latents"}, {"noise": "Latents"})
    throw = stage("denoise", {"noise": "Latents", "dice": "Generator"}, {"latents": "Latents"})
    draw, *_ = sketch(DRAW, throw, DECODE).services
    assert draw.contract.outputs == {"noise": "Latents", "dice": "Generator"}
    assert not draw.contract.optional_outputs
    before = stage("look", {"dice": "Generator"}, {"text": "Conditioning"})
    with pytest.raises(PipelineError, match="look reads 'dice', which no earlier stage writes"):
        sketch(
            before, DRAW, stage("denoise", {"noise": "Latents", "text": "Conditioning"}, {"latents": "Latents"}), DECODE
        )


def test_flux_runs_its_encoders_beside_its_preparation() -> None:
    pipeline = FluxPipeline(FluxPipeline._required_config_modules)
    text, preparation = pipeline.service("text_encoding").contract, pipeline.service("latent_preparation").contract
    assert not preparation.inputs.keys() & text.outputs.keys()
    assert preparation.outputs.keys() == {"initial_latents", "schedule"}
    assert pipeline.service("denoising").contract.optional == {"resume_from"}


class HybridSketch(StandardPipeline):
    """A pipeline of the hybrid style."""

    pipeline_name = "Hybrid"
    _required_config_modules = ("brain", "transformer", "scheduler", "vae")

    def create_pipeline_stages(self) -> None:
        """All work before denoising in one stage."""
        self.add_hybrid_stages("nowhere:Before", modules=("brain",))


def test_a_hybrid_pipeline_has_one_service_before_denoising() -> None:
    pipeline = HybridSketch(HybridSketch._required_config_modules)
    assert [spec.service for spec in pipeline.services] == ["before_denoising", "denoising", "decoding"]
    assert pipeline.service("before_denoising").contract.inputs.keys() == pipeline.given.keys()
    assert pipeline.service("before_denoising").modules == ("brain", "scheduler")


def test_a_hybrid_pipeline_is_checked_as_a_modular_one_is() -> None:
    class Twice(HybridSketch):
        def create_pipeline_stages(self) -> None:
            self._add_text_encoding(("brain",))
            super().create_pipeline_stages()

    with pytest.raises(PipelineError, match="BeforeDenoisingStage writes 'text_conditioning', which is already"):
        Twice(HybridSketch._required_config_modules)

    class Lacking(HybridSketch):
        def add_stage(self, stage: StageSpec) -> None:
            if stage.service != "before_denoising":
                super().add_stage(stage)

    with pytest.raises(PipelineError, match="DenoisingStage reads 'schedule', which no earlier stage writes"):
        Lacking(HybridSketch._required_config_modules)
    with pytest.raises(MissingModules, match=r"Hybrid needs .* lacks brain"):
        HybridSketch(("transformer", "scheduler", "vae"))


def test_pipelines_read_the_optional_inputs_that_they_name() -> None:
    read = {
        pipeline: pipeline(pipeline._required_config_modules).service("denoising").contract.optional
        for pipeline in (QwenImageEditPipeline, WanPipeline, WanImageToVideoPipeline)
    }
    assert read == {
        QwenImageEditPipeline: {"image_latents", "resume_from"},
        WanPipeline: {"resume_from"},
        WanImageToVideoPipeline: {"image_conditioning", "image_latents", "resume_from"},
    }
