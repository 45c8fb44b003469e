"""Extensions by users: a new stage service, and TLS for overlays whose workloads are not Deployments."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import manifest_checks
import manifest_scalers
import promql
import pytest
from manifest_checks import CHECKS
from manifests import K8S, Manifest, render

from services.cli.serve import settings_class

STAGE = "up_scaling"
NAME = "up-scaling"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the folder k8s/."""
    shutil.copytree(K8S, tmp_path / "k8s")
    return tmp_path / "k8s"


def add_stage(folder: Path) -> None:
    """Add a stage to a folder: a copy of denoising's file, and a line in the kustomization."""
    text = (folder / "denoising.yaml").read_text()
    new = text.replace("denoising", NAME).replace("DenoisingService", "UpScalingService")
    for form in ("[{}]", "stage: {}\n", "service: {},"):
        new = new.replace(form.format(NAME), form.format(STAGE))
    (folder / f"{STAGE}.yaml").write_text(new)
    path = folder / "kustomization.yaml"
    lines = path.read_text()
    assert lines.count("  - denoising.yaml\n") == 1
    path.write_text(lines.replace("  - denoising.yaml\n", f"  - denoising.yaml\n  - {STAGE}.yaml\n"))


@pytest.fixture
def registered_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the new service in the checks, with denoising's settings and a gRPC service."""
    protos, classes = manifest_checks.proto_services, settings_class
    for module in (manifest_checks, manifest_scalers):
        monkeypatch.setattr(module, "SERVICES", module.SERVICES | {STAGE})
    monkeypatch.setitem(promql._VALUES, "service", promql._VALUES["service"] | {STAGE})
    monkeypatch.setattr(manifest_checks, "settings_class", lambda name: classes("denoising" if name == STAGE else name))
    monkeypatch.setattr(
        manifest_checks,
        "proto_services",
        lambda name: ["fleet.v1.UpScalingService"] if name == STAGE else protos(name),
    )


def objects_of(manifests: Sequence[Manifest], name: str) -> dict[str, Manifest]:
    """Objects of a stage by kind."""
    return {each["kind"]: each for each in manifests if each["metadata"]["name"] == name}


def errors(manifests: list[Manifest]) -> list[str]:
    return [error for check in CHECKS.values() for error in check(manifests)]


@dataclass(frozen=True)
class Case:
    """An overlay, the folders to extend, and the resulting kinds of objects of the stage."""

    overlay: str
    folders: tuple[str, ...]
    kinds: frozenset[str]


KINDS = frozenset({"Deployment", "Service", "ServiceAccount", "PodDisruptionBudget", "NetworkPolicy"})
CASES = [
    Case("dev", ("base",), KINDS),
    Case("gpu", ("base",), KINDS),
    Case("hpa", ("base", "components/hpa"), KINDS | {"HorizontalPodAutoscaler"}),
    Case("keda", ("base", "components/keda"), KINDS | {"ScaledObject"}),
    Case("production", ("base", "components/keda"), KINDS | {"ScaledObject"}),
]


@pytest.mark.usefixtures("registered_stage")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.overlay)
def test_a_new_stage_needs_one_file_and_one_line_per_folder(tree: Path, case: Case) -> None:
    for folder in case.folders:
        add_stage(tree / folder)
    manifests = render(tree / "overlays" / case.overlay)
    new, old = objects_of(manifests, NAME), objects_of(manifests, "denoising")
    assert new.keys() == old.keys() == case.kinds
    for kind, each in new.items():
        text = json.dumps(each).replace("UpScaling", "Denoising").replace(NAME, "denoising")
        assert json.loads(text.replace(STAGE, "denoising")) == old[kind], kind
    # The emoji model does not have this stage.
    expected = ("emoji needs", "model emoji has no stage up_scaling")
    assert [each for each in errors(manifests) if not each.startswith(expected) and expected[1] not in each] == []


@pytest.mark.usefixtures("registered_stage")
def test_a_new_stage_without_a_role_in_the_disaggregated_set_is_an_error(tree: Path) -> None:
    for folder in ("base", "components/keda"):
        add_stage(tree / folder)
    found = errors(render(tree / "overlays" / "disaggregatedset"))
    assert f"ScaledObject/{NAME}: its target ('Deployment', '{NAME}') does not exist" in found
    assert f"Service/{NAME}: selector matches no pod" in found


@pytest.mark.parametrize(
    ("scaler", "kind"), [("keda", "ScaledObject"), ("hpa", "HorizontalPodAutoscaler")], ids=["keda", "hpa"]
)
def test_the_stage_before_denoising_needs_one_file_and_one_line_per_folder(tree: Path, scaler: str, kind: str) -> None:
    """Without these files and lines, only this stage is missing: no other object refers to it."""
    overlay = tree / "overlays" / "hybrid" / "kustomization.yaml"
    overlay.write_text(overlay.read_text().replace("components/keda", f"components/{scaler}"))
    whole = render(overlay.parent)
    assert errors(whole) == []
    assert {each["metadata"]["name"] for each in whole if each["kind"] == kind} == {
        "before-denoising",
        "denoising",
        "decoding",
    }
    for folder in ("base", f"components/{scaler}"):
        (tree / folder / "before_denoising.yaml").unlink()
        path = tree / folder / "kustomization.yaml"
        path.write_text(path.read_text().replace("  - before_denoising.yaml\n", ""))
    rest = render(overlay.parent)
    assert errors(rest) == []
    removed = [each for each in whole if each not in rest]
    assert {each["metadata"]["name"] for each in removed} == {"before-denoising"}
    assert [each for each in whole if each not in removed] == rest


@pytest.mark.parametrize("overlay", ["multi-node", "disaggregatedset"])
def test_tls_applies_to_any_workload(tree: Path, overlay: str) -> None:
    folder = tree / "overlays" / "with-tls"
    folder.mkdir()
    lines = ["resources:", f"  - ../{overlay}", "components:", "  - ../../components/tls", ""]
    (folder / "kustomization.yaml").write_text("\n".join(lines))
    manifests = render(folder)
    shared = [each["data"] for each in manifests if each["kind"] == "ConfigMap" and "FLEET_MODEL" in each["data"]]
    assert [data["FLEET_TLS_CERT"] for data in shared] == ["/etc/fleet/tls/tls.crt"]
    assert errors(manifests) == []
