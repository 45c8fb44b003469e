"""The README's table of families equals the table of the registry."""

from __future__ import annotations

import pytest

import families
from configs.pipeline_configs.flux import FluxPipelineConfig
from configs.pipeline_configs.wan import WanImageToVideoPipelineConfig, WanPipelineConfig
from models.registry import Registry, load_registry


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


def test_the_readme_has_the_table_of_the_registry(registry: Registry) -> None:
    text = families.README.read_text()
    table = families.table(registry)
    assert families.PART.replaced(text, table) == text, "run `poe families`"
    assert all(f"`{name}`" in table for name in registry.names())


@pytest.mark.parametrize("cell", ["`WanDMDPipeline`", "| hybrid |", "tp, ulysses |", "`image_15`", "PNG with alpha"])
def test_an_edit_of_the_table_is_detected(registry: Registry, cell: str) -> None:
    text = families.README.read_text()
    edited = text.replace(cell, "edited")
    assert edited != text
    assert families.PART.replaced(edited, families.table(registry)) == text


def test_rows_are_computed_from_the_configs(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    before = families.table(registry)
    monkeypatch.setattr(FluxPipelineConfig, "branches", ("positive",))
    monkeypatch.setattr(FluxPipelineConfig, "deviations", "")
    changed = set(families.table(registry).splitlines()) - set(before.splitlines())
    (row,) = changed
    assert "| tp, ulysses, ring | each step | nothing |" in row


def test_a_config_without_a_title_is_refused(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FluxPipelineConfig, "title", "")
    with pytest.raises(ValueError, match="title: FluxPipelineConfig has none"):
        families.table(registry)


def test_configs_that_differ_cannot_share_a_row(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WanImageToVideoPipelineConfig, "title", WanPipelineConfig.title)
    with pytest.raises(ValueError, match="configs with different deviations"):
        families.table(registry)


def test_a_variant_without_a_checkpoint_is_refused() -> None:
    registry = load_registry()
    registry.register_configs("FluxPipeline", variant="other", sampling_params="a:A", pipeline_config="b:B")
    with pytest.raises(LookupError, match="variant: 'other' of FluxPipeline"):
        families.table(registry)


def test_a_readme_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"README\.md: .* are not both in it"):
        families.PART.replaced("# README", "| table |\n")
