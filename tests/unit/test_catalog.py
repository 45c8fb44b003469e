"""Opening models by reference and validating requests, both without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from bare_checkpoint import build_bare_flux
from common.errors import CheckpointError, InvalidInput
from common.pipeline import PipelineError, StageSpec
from configs.sample.flux import FluxSamplingParams
from models.catalog import DEFAULT_MODEL, open_model, shipped_models
from models.pipelines.flux import FluxPipeline
from models.registry import Registry, load_registry
from models.validation import InputValidationStage
from toy_checkpoint import build_toy_checkpoint, toy_family


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


def test_the_default_model_is_shipped(registry: Registry) -> None:
    assert DEFAULT_MODEL in shipped_models()
    model = open_model(DEFAULT_MODEL, registry)
    assert model.name == "emoji"
    assert model.variants[0].sampling_params is FluxSamplingParams
    assert [spec.service for spec in model.services] == [
        "text_encoding",
        "latent_preparation",
        "denoising",
        "decoding",
    ]
    defaults = {spec.name: spec.default for spec in model.parameters()}
    assert (defaults["height"], defaults["num_inference_steps"], defaults["max_sequence_length"]) == (128, 20, 64)


@pytest.mark.parametrize(
    ("folder", "reference", "name"),
    [
        ("my-flux.1", "{}", "my-flux.1"),
        ("my-flux.1", "{}/", "my-flux.1"),
        ("my-flux.1", "hero=./{}", "hero"),
        ("my-flux.1", "{}/transformer/..", "my-flux.1"),
        (".a flux: é", "{}", "a-flux-"),
        ("a=b", "./{}", "a-b"),
        ("emoji", "./{}", "emoji"),
        ("ü", "{}", "model"),
        ("x" * 99, "{}", "x" * 64),
    ],
)
def test_a_directory_gets_a_valid_model_name(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, reference: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = build_bare_flux(tmp_path / folder)
    model = open_model(reference.format(folder), registry)
    assert (model.name, model.checkpoint.path) == (name, path)


def test_a_shipped_name_takes_precedence_over_a_directory(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build_bare_flux(tmp_path / "emoji")
    assert open_model("emoji", registry).checkpoint.path != tmp_path / "emoji"


@pytest.mark.parametrize("reference", ["nonesuch", "", "./nonesuch", "/nonesuch/emoji"])
def test_an_unknown_reference_is_refused_with_the_shipped_names(registry: Registry, reference: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a directory nor a shipped model; shipped models: emoji"):
        open_model(reference, registry)


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, "a:b"])
def test_an_invalid_model_name_is_refused(registry: Registry, tmp_path: Path, name: str) -> None:
    path = build_bare_flux(tmp_path / "flux")
    with pytest.raises(InvalidInput, match="is not a model name") as refused:
        open_model(f"{name}={path}", registry)
    assert refused.value.field == "model"


def test_an_unsupported_pipeline_is_refused_with_the_supported_names(registry: Registry, tmp_path: Path) -> None:
    path = build_toy_checkpoint(tmp_path / "toy")
    with pytest.raises(CheckpointError, match=r"'ToyPipeline' is not supported; supported: .*FluxPipeline"):
        open_model(str(path), registry)


def test_a_missing_module_is_refused(registry: Registry, tmp_path: Path) -> None:
    path = build_bare_flux(tmp_path / "flux")
    index = path / "model_index.json"
    index.write_text(index.read_text().replace("text_encoder_2", "text_encoder_3"))
    (path / "text_encoder_2").rename(path / "text_encoder_3")
    with pytest.raises(CheckpointError, match=r"model_index\.json lacks text_encoder_2"):
        open_model(str(path), registry)


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"height": 0}, "height: 0 is not a whole number from 1 to 8192"),
        ({"hieght": 64}, "'hieght' is not a parameter"),
        ({"guidance_scale": float("nan")}, "guidance_scale: nan is not a finite number"),
    ],
)
def test_invalid_sampling_defaults_are_refused(
    registry: Registry, tmp_path: Path, defaults: dict[str, object], message: str
) -> None:
    path = build_bare_flux(tmp_path / "flux", sampling_defaults=defaults)
    with pytest.raises(CheckpointError, match=rf"sampling_defaults\.json: {message}"):
        open_model(str(path), registry)


def test_a_plugin_family_is_opened_and_validated(tmp_path: Path) -> None:
    path = build_toy_checkpoint(tmp_path / "checkpoint")
    with toy_family(tmp_path / "plugins") as plugins:
        model = open_model(f"toy={path}", load_registry([plugins]))
        request = InputValidationStage(model).run({"prompt": "x", "seed": 1, "contrast": 2, "height": 12})
    assert (model.name, model.checkpoint.pipeline_name) == ("toy", "ToyPipeline")
    assert {**request.params.as_mapping(), **request.variant.pipeline.given} == {
        "prompt": "Prompt",
        "canvas": "Canvas",
        "sampling": "Sampling",
        "height": 8,
        "width": 32,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "seed": 1,
        "num_outputs_per_prompt": 1,
        "output_format": "png",
        "contrast": 2.0,
    }
    assert [warning.field for warning in request.warnings] == ["height"]


class GivenPipeline(FluxPipeline):
    """Flux's stages with one more given artifact, which validation cannot create."""

    given: ClassVar[Mapping[str, str]] = {**FluxPipeline.given, "noise": "Generator"}


class UnscheduledPipeline(FluxPipeline):
    """Flux's stages with renamed roles, so that no role is named `scheduler`."""

    def add_stage(self, stage: StageSpec) -> None:
        """Add the stage with the prefix `my_` on all roles."""
        super().add_stage(replace(stage, modules={f"my_{role}": name for role, name in stage.modules.items()}))


def test_a_pipeline_with_an_unknown_given_artifact_is_refused(registry: Registry) -> None:
    model = open_model(DEFAULT_MODEL, registry)
    variant = replace(model.variants[0], pipeline=GivenPipeline(model.checkpoint.modules))
    changed = replace(model, variants=(variant,))
    with pytest.raises(PipelineError, match="given: Generator cannot be created from a request"):
        InputValidationStage(changed)


def test_a_denoising_stage_without_the_role_of_a_scheduler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = load_registry()
    monkeypatch.setitem(registry._pipelines, "FluxPipeline", UnscheduledPipeline)
    with pytest.raises(PipelineError, match="DenoisingStage: role 'scheduler' has no module"):
        open_model(DEFAULT_MODEL, registry)


def test_validation_creates_the_given_artifacts_of_the_pipeline(registry: Registry) -> None:
    model = open_model(DEFAULT_MODEL, registry)
    request = InputValidationStage(model).run({"prompt": "a red apple"})
    assert {slot: type(value).__name__ for slot, value in request.artifacts.items()} == request.variant.pipeline.given
    assert request.warnings == ()


def test_images_are_refused_by_a_model_without_image_inputs(registry: Registry) -> None:
    stage = InputValidationStage(open_model(DEFAULT_MODEL, registry))
    with pytest.raises(InvalidInput, match=r"images: 1 is not 0; emoji \(FluxPipeline\) takes no images") as refused:
        stage.run({"prompt": "x"}, images={"image": b"an image"})
    assert refused.value.field == "images"


def test_opening_and_validation_import_no_torch(tmp_path: Path) -> None:
    path = build_toy_checkpoint(tmp_path / "checkpoint")
    program = f"""
import sys
from pathlib import Path
from models.catalog import open_model
from models.registry import load_registry
from models.validation import InputValidationStage

registry = load_registry([Path({str(tmp_path / "plugins")!r})])
for reference in ("emoji", "toy={path}"):
    model = open_model(reference, registry)
    InputValidationStage(model).run({{"prompt": "x"}})
    model.checkpoint.fingerprint
heavy = {{"torch", "numpy", "transformers", "diffusers", "safetensors"}} & sys.modules.keys()
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    with toy_family(tmp_path / "plugins"):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
