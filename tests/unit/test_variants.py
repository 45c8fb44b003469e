"""Variants of a model: registration, opening, common services, choice and warm-up."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from common.artifacts import Sampling
from common.codec import pack
from common.errors import CheckpointError, FailedPrecondition, InvalidInput
from common.local import HostedStages
from common.pipeline import ComposedPipeline, PipelineError, ServiceSpec, StageSpec
from common.rpc.replies import ReplyCache
from common.stage import Call, Contract
from common.variants import HostedVariants, unite_contracts, unite_services
from configs.pipeline_configs.flux import FluxPipelineConfig
from fleet.v1 import generation_pb2 as pb
from models.catalog import ServedModel, open_model
from models.loader import load_variants
from models.parallel.mesh import Degrees
from models.pipelines.flux import FluxPipeline
from models.registry import Registry, load_registry
from models.runtime import Runtime
from models.validation import InputValidationStage
from models.warm_up import WarmUp
from services.cli.models import lines_of
from services.coordinator.costs import costs_of
from services.denoising.settings import check_degrees
from toy_checkpoint import build_twin_checkpoint, twin_family

CPU = torch.device("cpu")
EMOJI = Path(__file__).resolve().parents[2] / "models" / "checkpoints" / "emoji"


def png() -> bytes:
    """A small image."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


class DoublePipeline(FluxPipeline):
    """Standard stages in two variants that differ only in name."""

    pipeline_name = "DoublePipeline"
    names = ("small", "large")

    @classmethod
    def variants(cls, checkpoint: Any) -> Mapping[str, type[ComposedPipeline]]:
        """The same stages under each name."""
        del checkpoint
        return dict.fromkeys(cls.names, cls)


def double_registry(*variants: str) -> Registry:
    registry = Registry()
    registry.register_pipeline(DoublePipeline)
    for variant in variants:
        registry.register_configs(
            "DoublePipeline",
            variant=variant,
            sampling_params="configs.sample.flux:FluxSamplingParams",
            pipeline_config="configs.pipeline_configs.flux:FluxPipelineConfig",
        )
    return registry


@pytest.fixture(scope="module")
def double_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "double"
    shutil.copytree(EMOJI, path)
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "_class_name": "DoublePipeline"}))
    return path


@pytest.fixture(scope="module")
def double(double_path: Path) -> ServedModel:
    return open_model(str(double_path), double_registry("small", "large"))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry with the twin family."""
    with twin_family(tmp_path / "plugins") as plugins:
        yield load_registry(plugins)


def test_configs_are_registered_once_for_each_variant() -> None:
    registry = double_registry("small", "large")
    assert list(registry.entry("DoublePipeline").configs) == ["small", "large"]
    with pytest.raises(ValueError, match="configs of variant 'small' of DoublePipeline are registered twice"):
        registry.register_configs("DoublePipeline", variant="small", sampling_params="a:A", pipeline_config="b:B")
    with pytest.raises(ValueError, match="variant 'other' of pipeline DoublePipeline has no configs"):
        registry.entry("DoublePipeline").configs_of("other")


def test_a_variant_without_configs_is_refused(double_path: Path) -> None:
    with pytest.raises(ValueError, match="variant 'large' of pipeline DoublePipeline has no configs"):
        open_model(str(double_path), double_registry("small"))


@pytest.mark.parametrize("names", [("Text",), ("", "image"), ("a b",), ("1st",)])
def test_a_variant_name_that_is_not_an_identifier_is_refused(
    double_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(DoublePipeline, "names", names)
    with pytest.raises(PipelineError, match=r"DoublePipeline: variant .* is not a lower-case identifier"):
        open_model(str(double_path), double_registry(*names))


def test_a_pipeline_without_variants_has_one_unnamed_variant() -> None:
    model = open_model("emoji", load_registry())
    (variant,) = model.variants
    assert variant.name == ""
    assert model.services == variant.services == variant.pipeline.services
    assert model.parameters() == variant.parameters()
    with pytest.raises(InvalidInput, match=r"images: 1 is not 0; emoji \(FluxPipeline\) takes no images") as caught:
        InputValidationStage(model).run({"prompt": "x"}, {"image": png()})
    assert caught.value.field == "images"


def test_without_a_module_of_one_variant_the_other_variants_are_served(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = build_twin_checkpoint(tmp_path / "twin", lens=False)
    with caplog.at_level(logging.WARNING):
        model = open_model(str(path), registry)
    reason = "TwinPipeline needs the modules palette, transformer, lens; model_index.json lacks lens"
    assert f'variant is not served model=twin variant=image reason="{reason}"' in caplog.text
    assert [each.name for each in model.variants] == ["text"]
    assert model.unserved == {"image": reason}
    assert InputValidationStage(model).run({"prompt": "x"}).variant.name == "text"
    with pytest.raises(InvalidInput) as caught:
        InputValidationStage(model).run({"prompt": "x"}, {"image": png()})
    assert caught.value.message == (
        f"images: image is not a set of images of twin, which takes: text (no images); variant image is not "
        f"served: {reason}"
    )
    with pytest.raises(
        InvalidInput, match=r"has no image_encoding service; .*variant image is not served: .* lacks lens"
    ):
        model.service("image_encoding")
    listed = pb.Model(variants=[pb.Variant(name="text"), pb.Variant(name="image", error=reason)])
    assert f"  variant image is not served: {reason}" in lines_of(listed)


def test_a_missing_module_that_every_variant_needs_is_an_error(registry: Registry, tmp_path: Path) -> None:
    path = build_twin_checkpoint(tmp_path / "twin")
    index = json.loads((path / "model_index.json").read_text())
    del index["palette"]
    (path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"needs the modules palette, transformer; .* lacks palette"):
        open_model(str(path), registry)


def test_inputs_choose_the_variant_and_a_record_overrides_them(registry: Registry, tmp_path: Path) -> None:
    model = open_model(str(build_twin_checkpoint(tmp_path / "twin")), registry)
    validation = InputValidationStage(model)
    assert validation.choose({"prompt"}, {"image"}).name == "image"
    assert validation.choose({"prompt"}, ()).name == "text"
    assert validation.choose({"prompt"}, (), "image").name == "image"
    assert validation.run({"prompt": "x"}, {}, recorded="text").variant.name == "text"
    with pytest.raises(
        FailedPrecondition, match="'video' of twin is not served by this coordinator; it serves text, image"
    ):
        validation.choose({"prompt"}, (), "video")


def test_parameters_choose_among_variants_with_the_same_images(
    double: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, _ = double.variants
    assert InputValidationStage(double).choose({"prompt"}, ()) is small
    monkeypatch.setitem(vars(small), "specs", small.specs[:1])
    assert InputValidationStage(double).choose({"prompt", "height"}, ()).name == "large"
    assert InputValidationStage(double).choose({"prompt", "no_such"}, ()) is small


def test_costs_are_computed_for_the_variant(registry: Registry, tmp_path: Path) -> None:
    model = open_model(str(build_twin_checkpoint(tmp_path / "twin")), registry)
    chosen = [InputValidationStage(model).run({"prompt": "x"}, images) for images in ({}, {"image": png()})]
    text, image = (costs_of(each.variant.services, each.params) for each in chosen)
    assert "image_encoding" not in text
    assert image["image_encoding"] == 32 * 32
    assert image["denoising"] * 4 == text["denoising"] * 6


def test_modules_are_loaded_once_by_one_loader(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The plugin's module can be imported only while its directory is on sys.path.
    import twin_config

    model = open_model(str(build_twin_checkpoint(tmp_path / "twin")), registry)
    stages = load_variants(model, model.service("denoising"), Runtime())
    assert twin_config.LOADED == ["transformer"]
    assert [type(each).__name__ for (each,) in stages.values()] == ["ToyDenoisingStage", "TwinDenoisingStage"]
    assert vars(stages["text"][0])["_gain"] is vars(stages["image"][0])["_gain"]
    assert list(load_variants(model, model.service("image_encoding"), Runtime())) == ["image"]
    loaders = {**twin_config.TwinPipelineConfig.module_loaders, "ToyTransformer": "toy_config:load_weight"}
    monkeypatch.setattr(twin_config.TwinImagePipelineConfig, "module_loaders", loaders)
    with pytest.raises(TypeError, match="loads transformer by 'toy_config:load_weight', and another variant by"):
        load_variants(model, model.service("denoising"), Runtime())


def test_slots_that_a_variant_lacks_are_optional() -> None:
    text = Contract("d", {"noise": "Latents", "hint": "Latents"}, {"result": "Latents"}, frozenset({"hint"}))
    image = Contract("d", {"noise": "Latents", "image": "Latents"}, {"result": "Latents", "more": "Generator"})
    united = unite_contracts("d", [text, image])
    assert dict(united.inputs) == {"noise": "Latents", "hint": "Latents", "image": "Latents"}
    assert united.optional == {"hint", "image"}
    assert dict(united.outputs) == {"result": "Latents", "more": "Generator"}
    assert united.optional_outputs == {"more"}
    assert unite_contracts("d", [text]) == text
    with pytest.raises(PipelineError, match="d: variants declare 'noise' as Latents and as Media"):
        unite_contracts("d", [text, Contract("d", {"noise": "Media"}, {})])


def test_services_of_all_variants_are_in_order() -> None:
    def services(*names: str) -> list[ServiceSpec]:
        contract = Contract("s", {}, {})
        return [ServiceSpec(name, contract, (StageSpec(contract, name, "a:A", {name: name}),)) for name in names]

    united = unite_services([services("text", "draw", "decode"), services("text", "look", "draw", "upscale", "decode")])
    assert [spec.service for spec in united] == ["text", "look", "draw", "upscale", "decode"]
    assert [spec.modules for spec in united] == [("text",), ("look",), ("draw",), ("upscale",), ("decode",)]
    assert [len(spec.stages) for spec in united] == [1] * 5


def test_hosted_variants_refuse_a_variant_that_they_do_not_serve(registry: Registry, tmp_path: Path) -> None:
    model = open_model(str(build_twin_checkpoint(tmp_path / "twin")), registry)
    stages = load_variants(model, model.service("denoising"), Runtime())
    hosted = HostedVariants("denoising", stages)
    assert hosted.of("") is hosted.of("text")
    assert hosted.contract_of("image") == hosted.of("image").contract
    with pytest.raises(
        InvalidInput, match="variant: 'video' is not a variant that denoising serves; it serves text, image"
    ):
        hosted.run({}, Call("r", variant="video"))
    with pytest.raises(InvalidInput, match="variant: 'image' is not a variant of this model") as caught:
        HostedStages("denoising", stages["text"]).contract_of("image")
    assert caught.value.field == "variant"


def test_replies_of_variants_have_separate_keys() -> None:
    cache = ReplyCache(1 << 20, service="text_encoding", model="twin")
    inputs = {"sampling": pack("sampling", Sampling(num_inference_steps=4, seed=1))}
    keys = [cache.key(inputs, variant) for variant in ("", "text", "image")]
    assert len(set(keys)) == 3
    assert keys == [cache.key(inputs, variant) for variant in ("", "text", "image")]


def test_warm_up_runs_every_variant_or_the_named_variant(double: ServedModel, caplog: pytest.LogCaptureFixture) -> None:
    warm_up = WarmUp.parse(double, ("32x32", "48x32@large"))
    assert [(variant.name, params.height) for variant, params in warm_up.sizes] == [
        ("small", 32),
        ("large", 32),
        ("large", 48),
    ]
    ran: list[str] = []
    with caplog.at_level(logging.INFO):
        warm_up.run(lambda _, call: ran.append(call.variant), torch.float32, Call("warm-up"))
    assert ran == ["small", "large", "large"]
    assert "warmed up size=48x32@large" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("32x32@video", "warm_up: 32x32@video does not end with a variant of double; its variants are small, large"),
        ("32x32@", "warm_up: 32x32@ does not end with a variant of double; its variants are small, large"),
        ("32@large", "'32' is not a size; .*, optionally followed by @VARIANT"),
        ("0x32@large", "warm_up: 0x32@large: height: 0 is not"),
    ],
)
def test_an_invalid_warm_up_is_refused(double: ServedModel, text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        WarmUp.parse(double, (text,))
    assert caught.value.field == "warm_up"


def test_a_variant_in_the_warm_up_of_a_model_without_variants_is_refused() -> None:
    with pytest.raises(InvalidInput, match="does not end with a variant of emoji; write the size without @"):
        WarmUp.parse(open_model("emoji", load_registry()), ("32x32@text",))


def test_cfg_is_at_most_the_largest_number_of_branches_of_a_variant(
    double: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InvalidInput, match="cfg: 3 is not at most 2; DoublePipeline has 2 branches: positive, negative"
    ):
        check_degrees(double, Degrees(cfg=3))
    monkeypatch.setattr(FluxPipelineConfig, "branches", ("positive", "negative", "perturbed"))
    check_degrees(double, Degrees(cfg=3))
    with pytest.raises(InvalidInput, match="3 branches: positive, negative, perturbed") as caught:
        check_degrees(double, Degrees(cfg=4))
    assert caught.value.field == "cfg"
