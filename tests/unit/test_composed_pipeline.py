"""Building a pipeline checks its wiring."""

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
IMAGE = stage("encode_image", {"prompt": "Prompt"}, {"image": "Conditioning"})
DECODE = stage("decode", {"latents": "Latents"}, {"media": "Media"}, result="media")
DRAW = stage(
    "draw", {"prompt": "Prompt"}, {"noise": "Latents", "generator": "Generator"}, optional_outputs=("generator",)
)


def problems(*stages: StageSpec, wanted: tuple[str, ...] = ("media",)) -> str:
    """Error message of check() for stages with one service per stage; empty without an error."""
    services = [ServiceSpec(each.service, each.contract, (each,)) for each in stages]
    try:
        check(services, given=GIVEN, wanted=wanted)
    except PipelineError as error:
        return str(error)
    return ""


def test_a_valid_wiring_has_no_problems() -> None:
    assert problems(ENCODE, DENOISE, DECODE) == ""
    assert problems(ENCODE, IMAGE, DENOISE, DECODE) == ""


def test_a_missing_producer_is_reported() -> None:
    assert problems(DENOISE, DECODE) == "denoise reads 'text', which no earlier stage writes"


def test_a_wrong_order_is_reported() -> None:
    assert problems(DENOISE, ENCODE, DECODE) == "denoise reads 'text', which no earlier stage writes"


def test_an_optional_slot_written_after_its_reader_is_reported() -> None:
    """Without this rule, two stages could each wait for a slot that the other stage writes."""
    assert problems(ENCODE, DENOISE, IMAGE, DECODE) == "denoise reads 'image', which no earlier stage writes"


def test_a_stage_that_reads_its_own_output_is_reported() -> None:
    assert "draw reads 'text'" in problems(stage("draw", {"text": "Conditioning"}, {"text": "Conditioning"}), wanted=())


def test_a_wrong_type_is_reported() -> None:
    other = stage("decode", {"latents": "Media"}, {"media": "Media"})
    assert problems(ENCODE, DENOISE, other) == "decode reads 'latents' as Media, but it is Latents"


def test_a_double_write_is_reported() -> None:
    assert problems(ENCODE, ENCODE, DENOISE, DECODE) == "encode writes 'text', which is already written"
    assert "'prompt', which is already written" in problems(stage("overwrite", {}, {"prompt": "Prompt"}), wanted=())


def test_a_wanted_slot_without_a_writer_is_reported() -> None:
    assert problems(ENCODE, DENOISE, wanted=("latents", "media")) == "nothing writes 'media', which the caller wants"


def test_an_unread_output_is_reported() -> None:
    """Unread optional outputs, such as the generator of DRAW, are permitted: the pipeline omits them."""
    assert problems(ENCODE, DRAW, DENOISE, DECODE) == "draw writes 'noise', which nothing reads"


def test_all_problems_are_reported_at_once() -> None:
    assert problems(DENOISE).split("; ") == [
        "denoise reads 'text', which no earlier stage writes",
        "denoise writes 'latents', which nothing reads",
        "nothing writes 'media', which the caller wants",
    ]


class FakePipeline(ComposedPipeline):
    """A pipeline of the stages in `stages`."""

    pipeline_name = "FakePipeline"
    _required_config_modules = ("vae",)
    stages: tuple[StageSpec, ...] = ()

    def create_pipeline_stages(self) -> None:
        for each in self.stages:
            self.add_stage(each)


def build(*stages: StageSpec, modules: tuple[str, ...] = ("vae",)) -> ComposedPipeline:
    class BuiltPipeline(FakePipeline):
        pass

    BuiltPipeline.stages = stages
    return BuiltPipeline(modules)


def test_building_checks_the_wiring() -> None:
    assert [spec.service for spec in build(ENCODE, DENOISE, DECODE).services] == ["encode", "denoise", "decode"]
    with pytest.raises(PipelineError, match="decode reads 'latents', which no earlier stage writes"):
        build(ENCODE, DECODE)
    with pytest.raises(PipelineError, match="defines no stages"):
        ComposedPipeline.create_pipeline_stages(build(ENCODE, DENOISE, DECODE))


def test_a_checkpoint_without_a_required_module_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"FakePipeline needs the modules vae; model_index\.json lacks vae"):
        build(ENCODE, DENOISE, DECODE, modules=("transformer",))


def test_stage_modules_exist_and_each_role_has_one_module() -> None:
    decode = replace(DECODE, modules={"vae": "vae", "solver": "scheduler"})
    with pytest.raises(PipelineError, match=r"decode requires scheduler, which model_index\.json lacks"):
        build(ENCODE, DENOISE, decode)
    pipeline = build(ENCODE, DENOISE, decode, modules=("vae", "scheduler"))
    service = pipeline.service("decode")
    assert service.modules == ("vae", "scheduler")
    assert [service.module_of(role) for role in ("vae", "solver", "scheduler")] == ["vae", "scheduler", None]
    assert pipeline.roles == {"vae": "vae", "solver": "scheduler"}
    other = replace(ENCODE, modules={"vae": "scheduler"})
    with pytest.raises(PipelineError, match="role 'vae' is assigned to scheduler and vae; a role has one module"):
        build(other, DENOISE, decode, modules=("vae", "scheduler"))


VAE = {"vae": "vae"}


def test_stages_of_one_service_must_be_consecutive() -> None:
    first = stage("encode", {"prompt": "Prompt"}, {"text": "Conditioning"}, service="worker", modules=VAE)
    second = stage("denoise", {"text": "Conditioning"}, {"latents": "Latents"}, service="worker", modules=VAE)
    spec = build(first, second, DECODE).service("worker")
    assert spec.modules == ("vae",)
    assert (spec.contract.inputs, set(spec.contract.outputs)) == ({"prompt": "Prompt"}, {"text", "latents"})
    apart = replace(DECODE, service="worker")
    with pytest.raises(PipelineError, match="the stages of worker are not consecutive"):
        build(first, IMAGE, second, apart)


def test_an_unknown_service_is_refused_with_the_known_names() -> None:
    with pytest.raises(
        PipelineError, match="FakePipeline has no image_encoding service; it has encode, denoise, decode"
    ):
        build(ENCODE, DENOISE, DECODE).service("image_encoding")


def test_an_input_is_optional_only_if_it_is_optional_for_all_readers() -> None:
    required = Contract("required", {"image": "Conditioning"}, {})
    optional = Contract("optional", {"image": "Conditioning"}, {}, frozenset({"image"}))
    assert compose_contracts("both", [optional, optional]).optional == {"image"}
    assert compose_contracts("both", [optional, required]).optional == frozenset()


def test_a_service_combines_cost_steps_and_resume_slot_of_its_stages() -> None:
    first = stage("encode", {"prompt": "Prompt"}, {"text": "Conditioning"}, service="worker", cost=Cost.PIXEL)
    contract = Contract(
        "denoise",
        {"text": "Conditioning", "stopped_at": "DenoiseState"},
        {"latents": "Latents"},
        frozenset({"stopped_at"}),
        resume_slot="stopped_at",
    )
    second = StageSpec(contract, "worker", "nowhere:denoise", cost=Cost.PIXEL_STEP, reports_steps=True)
    both, decode = build(first, second, DECODE).services
    assert (both.cost, both.reports_steps, both.resume_slot) == (Cost.PIXEL_STEP, True, "stopped_at")
    assert (decode.cost, decode.reports_steps, decode.resume_slot) == (Cost.REQUEST, False, None)
    third = replace(first, contract=replace(first.contract, resume_slot="text"))
    with pytest.raises(PipelineError, match="worker has several resumable stages, encode, denoise"):
        build(third, second, DECODE)


def test_a_pipeline_has_one_result() -> None:
    with pytest.raises(PipelineError, match=r"results \[\] are declared; a pipeline has exactly one"):
        build(ENCODE, DENOISE, replace(DECODE, result=None))
    with pytest.raises(PipelineError, match=r"results \['latents', 'media'\] are declared"):
        build(ENCODE, replace(DENOISE, result="latents"), DECODE)
    with pytest.raises(PipelineError, match="decode: result 'video' is not one of its outputs"):
        replace(DECODE, result="video")


def test_an_optional_output_is_omitted_unless_a_later_stage_reads_it() -> None:
    denoise = stage("denoise", {"noise": "Latents"}, {"latents": "Latents"})
    draw, *_ = build(DRAW, denoise, DECODE).services
    assert (draw.contract.outputs, draw.stages[0].contract.outputs) == ({"noise": "Latents"}, {"noise": "Latents"})
    random_denoise = stage("denoise", {"noise": "Latents", "generator": "Generator"}, {"latents": "Latents"})
    draw, *_ = build(DRAW, random_denoise, DECODE).services
    assert draw.contract.outputs == {"noise": "Latents", "generator": "Generator"}
    assert not draw.contract.optional_outputs
    before = stage("encode_image", {"generator": "Generator"}, {"text": "Conditioning"})
    with pytest.raises(PipelineError, match="encode_image reads 'generator', which no earlier stage writes"):
        build(
            before, DRAW, stage("denoise", {"noise": "Latents", "text": "Conditioning"}, {"latents": "Latents"}), DECODE
        )


def test_flux_text_encoding_and_latent_preparation_are_independent() -> None:
    pipeline = FluxPipeline(FluxPipeline._required_config_modules)
    text, preparation = pipeline.service("text_encoding").contract, pipeline.service("latent_preparation").contract
    assert not preparation.inputs.keys() & text.outputs.keys()
    assert preparation.outputs.keys() == {"initial_latents", "schedule"}
    assert pipeline.service("denoising").contract.optional == {"resume_from"}


class FakeHybridPipeline(StandardPipeline):
    """A pipeline with one stage for all work before denoising."""

    pipeline_name = "Hybrid"
    _required_config_modules = ("language_model", "transformer", "scheduler", "vae")

    def create_pipeline_stages(self) -> None:
        self.add_hybrid_stages("nowhere:Before", modules=("language_model",))


def test_a_hybrid_pipeline_has_one_service_before_denoising() -> None:
    pipeline = FakeHybridPipeline(FakeHybridPipeline._required_config_modules)
    assert [spec.service for spec in pipeline.services] == ["before_denoising", "denoising", "decoding"]
    assert pipeline.service("before_denoising").contract.inputs.keys() == pipeline.given.keys()
    assert pipeline.service("before_denoising").modules == ("language_model", "scheduler")


def test_the_wiring_of_a_hybrid_pipeline_is_checked() -> None:
    class DuplicateWriter(FakeHybridPipeline):
        def create_pipeline_stages(self) -> None:
            self._add_text_encoding(("language_model",))
            super().create_pipeline_stages()

    with pytest.raises(PipelineError, match="BeforeDenoisingStage writes 'text_conditioning', which is already"):
        DuplicateWriter(FakeHybridPipeline._required_config_modules)

    class MissingStage(FakeHybridPipeline):
        def add_stage(self, stage: StageSpec) -> None:
            if stage.service != "before_denoising":
                super().add_stage(stage)

    with pytest.raises(PipelineError, match="DenoisingStage reads 'schedule', which no earlier stage writes"):
        MissingStage(FakeHybridPipeline._required_config_modules)
    with pytest.raises(MissingModules, match=r"Hybrid needs .* lacks language_model"):
        FakeHybridPipeline(("transformer", "scheduler", "vae"))


def test_the_denoising_service_reads_the_optional_inputs_of_its_pipeline() -> None:
    read = {
        pipeline: pipeline(pipeline._required_config_modules).service("denoising").contract.optional
        for pipeline in (QwenImageEditPipeline, WanPipeline, WanImageToVideoPipeline)
    }
    assert read == {
        QwenImageEditPipeline: {"image_latents", "resume_from"},
        WanPipeline: {"resume_from"},
        WanImageToVideoPipeline: {"image_conditioning", "image_latents", "resume_from"},
    }
