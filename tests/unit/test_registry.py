"""Discovery of pipelines by the registry, and refusal of ambiguous or incomplete registrations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import CheckpointError
from common.pipeline import ComposedPipeline
from models.pipelines.flux import FluxPipeline
from models.registry import Registry, load_registry, resolve
from toy_checkpoint import toy_family

FAMILIES = [
    "Flux2KleinPipeline",
    "Flux2Pipeline",
    "FluxPipeline",
    "GlmImagePipeline",
    "HunyuanVideoPipeline",
    "LTX2ImageToVideoPipeline",
    "LTX2Pipeline",
    "LTXImageToVideoPipeline",
    "LTXPipeline",
    "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageLayeredPipeline",
    "QwenImagePipeline",
    "WanCausalDMDPipeline",
    "WanDMDPipeline",
    "WanImageToVideoPipeline",
    "WanPipeline",
    "ZImagePipeline",
]

PLUGIN = """
from models.pipelines.flux import FluxPipeline


class {name}(FluxPipeline):
    pipeline_name = {name!r}


def register_configs(registry):
    registry.register_configs({name!r}, sampling_params="a:A", pipeline_config="b:B")


EntryClass = {name}
"""


@pytest.fixture
def plugins(tmp_path: Path) -> Iterator[Path]:
    """An empty plugin directory, whose modules are unloaded after the test."""
    directory = tmp_path / "plugins"
    directory.mkdir()
    before = list(sys.path)
    yield directory
    sys.path[:] = before
    for path in tmp_path.rglob("*.py"):
        module = sys.modules.get(path.stem)
        if module is not None and module.__file__ == str(path):
            del sys.modules[path.stem]


def test_the_built_in_families_are_discovered() -> None:
    registry = load_registry()
    assert registry.names() == FAMILIES
    entry = registry.entry("FluxPipeline")
    assert entry.pipeline is FluxPipeline
    assert resolve(entry.configs_of("").sampling_params).__name__ == "FluxSamplingParams"
    assert resolve(entry.configs_of("").pipeline_config).__name__ == "FluxPipelineConfig"


def test_plugins_are_registered_without_importing_their_stages(tmp_path: Path) -> None:
    with toy_family(tmp_path / "plugins") as directory:
        registry = load_registry([directory])
        assert registry.names() == sorted([*FAMILIES, "ToyPipeline"])
        assert "toy_stages" not in sys.modules
        entry = registry.entry("ToyPipeline")
        assert resolve(entry.configs_of("").sampling_params).__module__ == "toy_sample"
        assert entry.pipeline(["palette", "transformer"]).service("denoising").modules == ("transformer",)
        assert load_registry([directory]).names() == registry.names()


def test_an_unsupported_pipeline_is_refused_with_the_supported_pipelines() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"'SanaPipeline' is not supported; supported: Flux2KleinPipeline, Flux2Pipeline, .*WanPipeline",
    ):
        load_registry().entry("SanaPipeline")


def test_a_second_registration_of_a_name_is_refused(plugins: Path) -> None:
    registry = Registry()
    registry.register_pipeline(FluxPipeline)
    with pytest.raises(ValueError, match="pipeline FluxPipeline is registered twice"):
        registry.register_pipeline(FluxPipeline)
    registry.register_configs("FluxPipeline", sampling_params="a:A", pipeline_config="b:B")
    with pytest.raises(ValueError, match="configs of FluxPipeline are registered twice"):
        registry.register_configs("FluxPipeline", sampling_params="a:A", pipeline_config="b:B")
    (plugins / "second_flux.py").write_text(PLUGIN.format(name="FluxPipeline"))
    with pytest.raises(ValueError, match="registered twice"):
        load_registry([plugins])


def test_a_pipeline_without_configs_is_refused() -> None:
    registry = Registry()
    registry.register_pipeline(FluxPipeline)
    with pytest.raises(ValueError, match="FluxPipeline has no configs; register them"):
        registry.entry("FluxPipeline")


def test_an_entry_class_that_is_not_a_pipeline_is_refused(plugins: Path) -> None:
    (plugins / "not_a_pipeline.py").write_text("EntryClass = int\n")
    with pytest.raises(TypeError, match="EntryClass: <class 'int'> is not a subclass of ComposedPipeline"):
        load_registry([plugins])


def test_a_pipeline_file_without_register_configs_is_refused(plugins: Path) -> None:
    text = PLUGIN.format(name="QuietPipeline")
    (plugins / "quiet_family.py").write_text(text.replace("def register_configs", "def other_name"))
    with pytest.raises(TypeError, match=r"quiet_family does not define register_configs\(registry\)"):
        load_registry([plugins])


def test_an_import_error_of_a_plugin_is_raised(plugins: Path) -> None:
    (plugins / "broken_family.py").write_text("import nonesuch_package\n\nEntryClass = None\n")
    with pytest.raises(ModuleNotFoundError, match="nonesuch_package"):
        load_registry([plugins])


def test_a_plugin_cannot_take_the_name_of_another_module(plugins: Path) -> None:
    (plugins / "json.py").write_text(PLUGIN.format(name="JsonPipeline"))
    with pytest.raises(ImportError, match=r"json\.py cannot be imported: 'json' is .*; rename the file"):
        load_registry([plugins])


@pytest.mark.parametrize(("directory", "message"), [("absent", "does not exist"), ("plugins", "defines EntryClass")])
def test_a_plugin_directory_without_plugins_is_refused(plugins: Path, directory: str, message: str) -> None:
    (plugins / "helper.py").write_text("raise RuntimeError('this file is not a plugin')\n")
    with pytest.raises(CheckpointError, match=message):
        load_registry([plugins.parent / directory])


def test_plugins_of_two_directories_are_discovered(plugins: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (plugins / "first_family.py").write_text(PLUGIN.format(name="FirstPipeline"))
    (other / "second_family.py").write_text(PLUGIN.format(name="SecondPipeline"))
    registry = load_registry([plugins, other])
    assert registry.names() == sorted([*FAMILIES, "FirstPipeline", "SecondPipeline"])
    assert issubclass(registry.entry("SecondPipeline").pipeline, ComposedPipeline)


@pytest.mark.parametrize("reference", ["json:nonesuch", "json", "nonesuch_package:Name"])
def test_an_unresolvable_reference_is_an_import_error(reference: str) -> None:
    with pytest.raises(ImportError):
        resolve(reference)
