"""Every overlay matches Kubernetes' schemas and passes the semantic checks, which find planted errors."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import kubernetes_validate
import pytest
from crds import BUILT_IN_GROUPS
from manifest_checks import CHECKS
from manifests import K8S, SERVICES, Manifest, kustomizations, name_of, pods, render
from planted import PLANTED, Planted
from planted_workers import PLANTED_IN_WORKERS

from models.registry import load_registry

ALL_PLANTED = [*PLANTED, *PLANTED_IN_WORKERS]
OVERLAYS = {path.name: path for path in kustomizations()}
KUBERNETES = "1.37"


@functools.cache
def rendered(overlay: str) -> list[Manifest]:
    return render(OVERLAYS[overlay])


@functools.cache
def validate(text: str) -> None:
    """Validate objects; cached, as overlays share objects."""
    kubernetes_validate.validate(json.loads(text), KUBERNETES, strict=True)


def test_all_overlays_are_found() -> None:
    assert {
        "dev",
        "gpu",
        "gpu-group",
        "hybrid",
        "multi-node",
        "disaggregatedset",
        "keda",
        "keda-prometheus",
        "hpa",
        "production",
    } == set(OVERLAYS)
    files = {path.stem for path in (K8S / "base").glob("*.yaml")} - {"kustomization", "namespace"}
    assert files == {*SERVICES, "redis"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_objects_match_the_kubernetes_schemas(overlay: str) -> None:
    built_in = [each for each in rendered(overlay) if each["apiVersion"] in BUILT_IN_GROUPS]
    assert built_in
    for each in built_in:
        try:
            validate(json.dumps(each, sort_keys=True))
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{name_of(each)}: {error.message}")


def test_validation_refuses_an_unknown_key() -> None:
    wrong = copy.deepcopy(next(each for each in rendered("dev") if each["kind"] == "Deployment"))
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenessProb"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_passes_every_check(overlay: str, check: str) -> None:
    assert list(CHECKS[check](rendered(overlay))) == []


def test_every_check_has_a_planted_error() -> None:
    assert {each.check for each in ALL_PLANTED} == set(CHECKS)


@pytest.mark.parametrize("planted", ALL_PLANTED, ids=lambda each: f"{each.check}-{each.error}")
def test_a_planted_error_is_found(planted: Planted) -> None:
    manifests = copy.deepcopy(rendered(planted.overlay))
    planted.plant(manifests)
    found = list(CHECKS[planted.check](manifests))
    assert any(planted.error in error for error in found), found


def test_the_hybrid_overlay_has_the_stages_of_its_pipeline() -> None:
    """The stages of modular models cannot serve this pipeline."""
    pipeline = load_registry().entry("GlmImagePipeline").pipeline
    wanted = {spec.service for spec in pipeline(pipeline._required_config_modules).services}
    assert {pod.service for pod in pods(rendered("hybrid")) if pod.service} == wanted | {"coordinator"}


def test_an_invalid_kustomization_is_reported(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [nothing.yaml]\n")
    with pytest.raises(RuntimeError, match=r"nothing\.yaml"):
        render(tmp_path)
