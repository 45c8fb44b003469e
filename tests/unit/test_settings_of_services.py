"""Each service has only the settings that it reads, and errors name the services that read a setting."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from common.pipeline import StageSpec
from common.settings import SettingsError, load_settings
from models.registry import load_registry, resolve
from services import stage_services
from services.cli.serve import module_of, service_names, settings_class
from services.setting_readers import READERS
from services.worker_settings import CachingSettings, StepSettings

ROOT = Path(__file__).resolve().parents[2]
SERVICES = service_names()
WORKERS = [name for name in SERVICES if name != "coordinator"]


def fields_of(service: str) -> set[str]:
    return {item.name for item in dataclasses.fields(settings_class(service))}


def _path(module: str) -> Path | None:
    """The file of a module of this tree, or None for another module."""
    base = ROOT / module.replace(".", "/")
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@cache
def _tree(module: str) -> ast.Module:
    path = _path(module)
    assert path is not None
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_of(*roots: str) -> set[str]:
    """These modules, and the modules of this tree that they import, directly or indirectly."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        if module not in found and _path(module) is not None:
            found.add(module)
            waiting.extend(_imports(_tree(module)))
    return found


def reads(tree: ast.AST, settings: tuple[str, ...] = ("settings",)) -> set[str]:
    """Attributes read from objects named settings or _settings, and from `self` in a settings class."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Settings") and "self" not in settings:
            found |= reads(node, (*settings, "self"))
        match node:
            case ast.Attribute(ast.Name(name), attribute) if name in settings:
                found.add(attribute)
            case ast.Attribute(ast.Attribute(_, "_settings"), attribute):
                found.add(attribute)
    return found


def test_the_table_lists_the_services_without_a_module_of_their_own() -> None:
    assert sorted(stage_services.SETTINGS) == [
        service for service in SERVICES if module_of(service) == stage_services.__name__
    ]


@pytest.mark.parametrize("service", SERVICES)
def test_every_setting_is_read(service: str) -> None:
    """Each setting is read by a module that the service imports."""
    found = {name for module in modules_of(module_of(service)) for name in reads(_tree(module))}
    assert not fields_of(service) - found


def test_an_unread_setting_is_found() -> None:
    source = "class ASettings:\n    b: int = 1\n    @property\n    def c(self): return self.d\n"
    assert reads(ast.parse(source)) == {"d"}
    assert reads(ast.parse("x.b\nsettings.e\nself._settings.f\n")) == {"e", "f"}


def test_errors_name_the_services_that_read_a_setting() -> None:
    names = set().union(*map(fields_of, SERVICES))
    expected = {
        name: services
        for name in names
        if len(services := {service for service in SERVICES if name in fields_of(service)}) < len(SERVICES)
    }
    assert {name: set(services) for name, services in READERS.items()} == expected


def _stages(service: str) -> Iterator[StageSpec]:
    """Stages of all families that run in the service."""
    registry = load_registry()
    for name in registry.names():
        pipeline = registry.entry(name).pipeline
        for spec in pipeline(pipeline._required_config_modules).services:
            if spec.service == service:
                yield from spec.stages


def _reports_steps(stage: StageSpec) -> bool:
    """Whether the stage calls Call.progress(), directly or through paced steps."""
    module = stage.implementation.partition(":")[0]
    modules = {module, "models.stages.pacing"} & modules_of(module)
    nodes = (node for each in modules for node in ast.walk(_tree(each)))
    return any(isinstance(node, ast.Attribute) and node.attr == "progress" for node in nodes)


@pytest.mark.parametrize("service", WORKERS)
def test_a_service_has_caching_and_step_settings_only_if_its_stages_use_them(service: str) -> None:
    stages = list(_stages(service))
    assert stages
    is_cached = any(resolve(stage.implementation).indifferent_to is not None for stage in stages)
    assert issubclass(settings_class(service), CachingSettings) == is_cached
    assert issubclass(settings_class(service), StepSettings) == any(map(_reports_steps, stages))


@pytest.mark.parametrize(
    ("service", "flags", "message"),
    [
        (
            "decoding",
            ("--step-checkpoint-every", "1"),
            "--step-checkpoint-every is not .* services that read it: denoising$",
        ),
        ("text_encoding", ("--hang-seconds=3",), "services that read it: before_denoising, denoising, decoding$"),
        ("image_encoding", ("--reply-cache-bytes", "0"), "services that read it: text_encoding$"),
        ("denoising", ("--api-keys", "x"), "services that read it: coordinator$"),
        ("coordinator", ("--device", "cpu"), "services that read it: text_encoding, image_encoding, latent_prep"),
        ("decoding", ("--nothing", "1"), "unrecognized arguments: --nothing 1; see fleet serve --help"),
    ],
)
def test_a_flag_of_another_service_is_refused(service: str, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(
            settings_class(service), ["--redis", "unix:///x", *flags], prog="fleet serve", environ={}, readers=READERS
        )


def test_a_key_of_another_service_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "decoding.toml"
    path.write_text("reply_cache_bytes = 0\n")
    with pytest.raises(SettingsError, match=r"reply_cache_bytes in .* is not .* services that read it: text_encoding$"):
        load_settings(settings_class("decoding"), ["--config", str(path)], prog="x", environ={}, readers=READERS)


def test_a_variable_of_another_service_is_ignored() -> None:
    environ = {"FLEET_REDIS": "unix:///x", "FLEET_STEP_CHECKPOINT_EVERY": "1", "FLEET_QUEUE_LIMIT": "2"}
    for service in SERVICES:
        settings = load_settings(settings_class(service), [], prog="x", environ=environ, readers=READERS)
        assert settings.redis == "unix:///x"
