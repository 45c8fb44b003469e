"""What users add to the tree: a further stage service, and TLS for overlays whose pods are not Deployments."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from manifest_checks import CHECKS
from manifests import K8S, Manifest, find, render


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of k8s/."""
    shutil.copytree(K8S, tmp_path / "k8s")
    return tmp_path / "k8s"


def add_stage(folder: Path, name: str) -> None:
    """A file for a new stage, as that of denoising, and a line in the kustomization."""
    text = (folder / "denoising.yaml").read_text()
    new = text.replace("denoising", name.replace("_", "-")).replace(f"[{name.replace('_', '-')}]", f"[{name}]")
    (folder / f"{name}.yaml").write_text(new.replace(f"stage: {name.replace('_', '-')}", f"stage: {name}"))
    path = folder / "kustomization.yaml"
    path.write_text(path.read_text().replace("  - denoising.yaml\n", f"  - denoising.yaml\n  - {name}.yaml\n"))


def errors(manifests: list[Manifest]) -> list[str]:
    return [error for check in CHECKS.values() for error in check(manifests)]


def test_a_new_stage_is_a_file_and_a_line_in_base_and_keda(tree: Path) -> None:
    for folder in ("base", "components/keda"):
        add_stage(tree / folder, "up_scaling")
    manifests = render(tree / "overlays" / "keda")
    # proto/ and services/ have no such service: its name is not known, nor what a probe may ask it for.
    expected = ("up_scaling", "readinessProbe asks for 'fleet.v1.DenoisingService'")
    assert [each for each in errors(manifests) if not any(part in each for part in expected)] == []
    assert find(manifests, "Deployment", "up-scaling") is not None
    scaled = find(manifests, "ScaledObject", "up-scaling")
    assert scaled is not None
    assert scaled["spec"]["triggers"][0]["metadata"]["stage"] == "up_scaling"


@pytest.mark.parametrize(
    ("scaler", "kind"), [("keda", "ScaledObject"), ("hpa", "HorizontalPodAutoscaler")], ids=["keda", "hpa"]
)
def test_the_stage_before_denoising_is_a_file_and_a_line_in_each_folder(tree: Path, scaler: str, kind: str) -> None:
    """Without them, a fleet of the hybrid style lacks this stage alone, and nothing else refers to it."""
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
    gone = [each for each in whole if each not in rest]
    assert {each["metadata"]["name"] for each in gone} == {"before-denoising"}
    assert [each for each in whole if each not in gone] == rest


@pytest.mark.parametrize("overlay", ["multi-node", "disaggregatedset"])
def test_tls_goes_with_any_workload(tree: Path, overlay: str) -> None:
    folder = tree / "overlays" / "with-tls"
    folder.mkdir()
    lines = ["resources:", f"  - ../{overlay}", "components:", "  - ../../components/tls", ""]
    (folder / "kustomization.yaml").write_text("\n".join(lines))
    manifests = render(folder)
    shared = [each["data"] for each in manifests if each["kind"] == "ConfigMap" and "FLEET_MODEL" in each["data"]]
    assert [data["FLEET_TLS_CERT"] for data in shared] == ["/etc/fleet/tls/tls.crt"]
    assert errors(manifests) == []
