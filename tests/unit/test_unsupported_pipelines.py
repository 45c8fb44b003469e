"""Unsupported Diffusers pipelines are refused with the supported classes and any closest match."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest

from common.errors import CheckpointError
from models.catalog import open_model
from models.registry import Registry, load_registry

CLOSEST_MATCHES = {
    "Flux2KleinInpaintPipeline": "Flux2KleinPipeline",
    "Flux2KleinKVPipeline": "Flux2KleinPipeline",
    "Flux2KleinModularPipeline": "Flux2KleinPipeline",
    "Flux2ModularPipeline": "Flux2Pipeline",
    "FluxControlPipeline": "FluxPipeline",
    "FluxFillPipeline": "FluxPipeline",
    "FluxKontextPipeline": "FluxPipeline",
    "HunyuanVideo15Pipeline": "HunyuanVideoPipeline",
    "HunyuanVideoImageToVideoPipeline": "HunyuanVideoPipeline",
    "LTX2ConditionPipeline": "LTX2Pipeline",
    "LTXConditionPipeline": "LTXPipeline",
    "LTXI2VLongMultiPromptPipeline": "LTXImageToVideoPipeline",
    "QwenImage21Pipeline": "QwenImagePipeline",
    "QwenImageEditInpaintPipeline": "QwenImageEditPipeline",
    "QwenImageEditPlusModularPipeline": "QwenImageEditPlusPipeline",
    "QwenImageInpaintPipeline": "QwenImagePipeline",
    "QwenImageLayeredModularPipeline": "QwenImageLayeredPipeline",
    "Wan22Image2VideoModularPipeline": "WanImageToVideoPipeline",
    "WanAnimatePipeline": "WanImageToVideoPipeline",
    "WanVACEPipeline": "WanPipeline",
    "WanVideoToVideoPipeline": "WanPipeline",
    "ZImageOmniPipeline": "ZImagePipeline",
}
DISSIMILAR = ("AuraFlowPipeline", "HunyuanDiTPipeline", "HunyuanImagePipeline", "LucyEditPipeline", "SanaPipeline")
FAMILIES = ("Flux", "GlmImage", "HunyuanVideo", "LTX", "QwenImage", "Wan", "ZImage")
"""Prefixes of names that resemble a supported pipeline."""


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


def unsupported(registry: Registry) -> list[str]:
    """The pipeline classes that Diffusers exports and this fleet does not serve."""
    return sorted(name for name in set(dir(diffusers)) - set(registry.names()) if name.endswith("Pipeline"))


def refusal(path: Path, name: str, registry: Registry) -> str:
    """The message for a directory of this class with modules of unknown kinds."""
    (path / "model_index.json").write_text(json.dumps({"_class_name": name, "unknown": ["nowhere", "Nothing"]}))
    with pytest.raises(CheckpointError) as refused:
        open_model(str(path), registry)
    return refused.value.message


def test_every_unsupported_pipeline_of_diffusers_is_refused_by_name(registry: Registry, tmp_path: Path) -> None:
    names = unsupported(registry)
    supported = ", ".join(registry.names())
    assert len(names) > 200
    assert CLOSEST_MATCHES.keys() | set(DISSIMILAR) <= set(names)
    for name in names:
        start = f"pipeline {name!r} is not supported; supported: {supported}"
        message = refusal(tmp_path, name, registry)
        assert message.startswith(start)
        assert ("the closest match is" in message) is name.startswith(FAMILIES), message


@pytest.mark.parametrize("name", CLOSEST_MATCHES)
def test_the_closest_match_is_named(registry: Registry, tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path, name, registry).endswith(f"; the closest match is {CLOSEST_MATCHES[name]}")


@pytest.mark.parametrize("name", [*DISSIMILAR, "Wander", "Fluxion", ""])
def test_a_dissimilar_pipeline_has_no_match(registry: Registry, tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path, name, registry).endswith(f"supported: {', '.join(registry.names())}")
