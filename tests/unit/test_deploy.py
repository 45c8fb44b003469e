"""Deployment files of containers: service names agree, and each setting exists in its service."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from opentelemetry.sdk import environment_variables

from common.settings import SettingsError, load_settings
from services.cli.serve import service_names, settings_class

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "configs" / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES = service_names()


def _compose(name: str) -> dict[str, Any]:
    """The services of a compose file, with variables replaced by their defaults."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / name).read_text())
    services: dict[str, Any] = yaml.safe_load(text)["services"]
    return services


COMPOSE = _compose("compose.yaml")
GPU = _compose("compose.gpu.yaml")


def _settings(service: str, environ: dict[str, str]) -> Any:
    arguments = ["--config", str(DEPLOY / f"{service}.toml")]
    return load_settings(settings_class(service), arguments, prog=service, environ=environ)


def _seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def test_services_log_json_in_kubernetes() -> None:
    base = yaml.safe_load((ROOT / "k8s" / "base" / "kustomization.yaml").read_text())
    (config_map,) = [each for each in base["configMapGenerator"] if each["name"] == "fleet"]
    environ = {"FLEET_REDIS": "redis://redis", **dict(each.split("=", 1) for each in config_map["literals"])}
    assert {_settings(service, environ).log_format for service in SERVICES} == {"json"}


def test_service_names_agree_in_compose_files_settings_files_and_protos() -> None:
    assert set(COMPOSE) - {"redis"} == set(SERVICES)
    assert {path.stem for path in DEPLOY.glob("*.toml")} == set(SERVICES)
    protos = {path.stem for path in (ROOT / "proto" / "fleet" / "v1").glob("*.proto")}
    assert set(SERVICES) - {"coordinator"} <= protos
    assert set(GPU) <= set(SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_compose_passes_settings_that_the_service_reads(service: str) -> None:
    spec = COMPOSE[service]
    assert spec["command"] == [service, "--config", f"/etc/fleet/{service}.toml"]
    given = {name: value for name, value in spec["environment"].items() if value is not None}
    for environ in (given, given | GPU.get(service, {}).get("environment", {})):
        settings = _settings(service, environ)
        read = {f"FLEET_{name.upper()}" for name in vars(settings)}
        assert set(environ) <= read
        assert settings.log_format == "text"
        assert _seconds(spec["stop_grace_period"]) > settings.grace_seconds
        assert f"127.0.0.1:{settings.listen.rpartition(':')[2]}" in DOCKERFILE


@pytest.mark.parametrize("service", SERVICES)
def test_compose_passes_trace_variables_from_the_shell(service: str) -> None:
    """The shell cannot set a variable that has a literal value in compose.yaml."""
    passed = {name for name, value in COMPOSE[service]["environment"].items() if value is None}
    assert {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"} <= passed
    assert passed <= set(environment_variables.__dict__)


def test_a_misspelled_setting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "decoding.toml"
    path.write_text((DEPLOY / "decoding.toml").read_text().replace("capacity", "capasity"))
    environ = {name: value for name, value in COMPOSE["decoding"]["environment"].items() if value is not None}
    with pytest.raises(SettingsError, match="capasity"):
        load_settings(settings_class("decoding"), ["--config", str(path)], prog="decoding", environ=environ)


def test_images_are_targets_of_the_dockerfile() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.MULTILINE))
    for spec in [*COMPOSE.values(), *GPU.values()]:
        if "build" in spec:
            assert spec["build"]["target"] in targets
            assert spec["image"] == f"diffusion-fleet:{spec['build']['target']}"


def test_services_start_after_redis_is_healthy() -> None:
    assert "healthcheck" in COMPOSE["redis"]
    assert all(COMPOSE[name]["depends_on"] == {"redis": {"condition": "service_healthy"}} for name in SERVICES)
    command = " ".join(COMPOSE["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--appendfsync always" in command


def test_the_gpu_file_gives_every_stage_the_same_dtype() -> None:
    workers = set(SERVICES) - {"coordinator"}
    assert {GPU[name]["environment"]["FLEET_DTYPE"] for name in workers} == {"bfloat16"}
