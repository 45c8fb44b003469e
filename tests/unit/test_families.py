"""The tables of families in README files equal the tables of the registry."""

from __future__ import annotations

import pytest

import families
from configs.pipeline_configs.flux import FluxPipelineConfig
from configs.pipeline_configs.wan import WanImageToVideoPipelineConfig, WanPipelineConfig
from generated_part import GeneratedPart
from models.registry import Registry, load_registry


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


def tables(registry: Registry) -> list[tuple[GeneratedPart, str]]:
    found = families.all_families(registry)
    return [(families.PART, families.table(found)), (families.DETAILS, families.details(found))]


def test_the_readmes_have_the_tables_of_the_registry(registry: Registry) -> None:
    for part, table in tables(registry):
        text = part.readme.read_text()
        assert part.replaced(text, table) == text, "run `poe families`"
    (_, short), _ = tables(registry)
    assert all(f"`{name}`" in short for name in registry.names())


@pytest.mark.parametrize(
    "cell", ["`WanDMDPipeline`", "| hybrid |", "| tp, ulysses |", "`image_15`", "PNG with alpha", "| each step |"]
)
def test_an_edit_of_a_table_is_detected(registry: Registry, cell: str) -> None:
    found = 0
    for part, table in tables(registry):
        text = part.replaced(part.readme.read_text(), table)
        edited = text.replace(cell, "edited")
        assert part.replaced(edited, table) == text
        found += edited != text
    assert found == 1


def test_rows_are_computed_from_the_configs(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    before = families.details(families.all_families(registry))
    monkeypatch.setattr(FluxPipelineConfig, "branches", ("positive",))
    monkeypatch.setattr(FluxPipelineConfig, "deviations", "")
    changed = set(families.details(families.all_families(registry)).splitlines()) - set(before.splitlines())
    (row,) = changed
    assert "| tp, ulysses, ring | each step | nothing |" in row


def test_a_config_without_a_title_is_refused(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FluxPipelineConfig, "title", "")
    with pytest.raises(ValueError, match="title: FluxPipelineConfig has no title"):
        families.all_families(registry)


def test_configs_that_differ_cannot_share_a_row(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WanImageToVideoPipelineConfig, "title", WanPipelineConfig.title)
    with pytest.raises(ValueError, match="configs that differ in deviations"):
        families.all_families(registry)


def test_a_variant_without_a_checkpoint_is_refused() -> None:
    registry = load_registry()
    registry.register_configs("FluxPipeline", variant="other", sampling_params="a:A", pipeline_config="b:B")
    with pytest.raises(LookupError, match="variant: 'other' of FluxPipeline"):
        families.all_families(registry)


def test_a_readme_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"README\.md: .* are not both present"):
        families.PART.replaced("# README", "| table |\n")
