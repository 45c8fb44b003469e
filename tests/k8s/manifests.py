"""Rendered Kubernetes manifests: objects of overlays, and their pods, settings and selectors."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from services.cli.serve import service_names

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
SERVICES = frozenset(service_names())
FLEET_CONTAINER = "fleet"
WORKLOADS = ("Deployment", "LeaderWorkerSet", "DisaggregatedSet")

Manifest = dict[str, Any]
Labels = Mapping[str, str]

_SET_BY_LWS = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "denoising-0.denoising"}
"""Variables that LeaderWorkerSet adds to containers, with sample values."""


def kustomizations() -> list[Path]:
    """Folders of all overlays. The base is excluded: it also has stages that its model does not use."""
    return sorted(path.parent for path in (K8S / "overlays").glob("*/kustomization.yaml"))


def render(folder: Path) -> list[Manifest]:
    """Render a kustomization; returns its objects. Raises RuntimeError with kubectl's message."""
    kubectl = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or "kubectl"
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{folder}: {done.stderr.strip()}")
    return [each for each in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if each]


@dataclass(frozen=True)
class Pod:
    """A pod template. `serves` is False for followers of a worker group, which have no gRPC server."""

    owner: str
    labels: Labels
    spec: Manifest
    serves: bool = True

    @property
    def container(self) -> Manifest:
        """The only container that is not an init container."""
        (container,) = self.spec["containers"]
        found: Manifest = container
        return found

    @property
    def containers(self) -> list[Manifest]:
        """All containers, init containers first."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def service(self) -> str:
        """Service of the fleet; empty for Redis."""
        return str(self.container["args"][0]) if self.container["name"] == FLEET_CONTAINER else ""

    @property
    def ports(self) -> dict[str, int]:
        """Container ports by name."""
        return {each["name"]: each["containerPort"] for each in self.container.get("ports", [])}


def name_of(manifest: Manifest) -> str:
    """KIND/NAME of an object, for messages."""
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def of_kind(manifests: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    """Objects of the given kinds."""
    return [each for each in manifests if each["kind"] in kinds]


def find(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest | None:
    """The object with this kind and name; None if it does not exist."""
    return next((each for each in of_kind(manifests, kind) if each["metadata"]["name"] == name), None)


def pods(manifests: Sequence[Manifest]) -> list[Pod]:
    """Pod templates of all workloads."""
    return [pod for each in manifests for pod in _pods_of(each)]


def _pods_of(manifest: Manifest) -> Iterator[Pod]:
    owner, spec = name_of(manifest), manifest.get("spec", {})
    if manifest["kind"] == "Deployment":
        yield _pod(owner, spec["template"])
    elif manifest["kind"] == "LeaderWorkerSet":
        yield from _group(owner, spec["leaderWorkerTemplate"])
    elif manifest["kind"] == "DisaggregatedSet":
        for role in spec["roles"]:
            yield from _group(f"{owner}/{role['name']}", role["spec"]["leaderWorkerTemplate"])


def _group(owner: str, template: Manifest) -> Iterator[Pod]:
    if leader := template.get("leaderTemplate"):
        yield _pod(f"{owner} leader", leader)
    yield _pod(f"{owner} worker", template["workerTemplate"], serves=leader is None)


def _pod(owner: str, template: Manifest, *, serves: bool = True) -> Pod:
    return Pod(owner, template["metadata"]["labels"], template["spec"], serves)


def matches(selector: Manifest | None, labels: Labels) -> bool:
    """Whether a label selector (matchLabels, matchExpressions) matches labels. An empty selector matches."""
    selector = selector or {}
    wanted = selector.get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        _meets(each, labels) for each in selector.get("matchExpressions", [])
    )


def _meets(expression: Manifest, labels: Labels) -> bool:
    present, value = expression["key"] in labels, labels.get(expression["key"])
    found = {"In": value in expression.get("values", []), "Exists": present}
    found |= {"NotIn": not found["In"], "DoesNotExist": not present}
    return found[expression["operator"]]


def environment(manifests: Sequence[Manifest], container: Manifest) -> dict[str, str]:
    """Environment variables of a container, as the kubelet sets them; Secrets have sample values."""
    values = dict(_SET_BY_LWS)
    for source in container.get("envFrom", []):
        values |= shared_variables(manifests, source)
    for each in container.get("env", []):
        values[each["name"]] = str(each.get("value", "redis://redis:6379/0"))
    return values


def shared_variables(manifests: Sequence[Manifest], source: Manifest) -> dict[str, str]:
    """Variables of an envFrom entry; empty if its ConfigMap does not exist."""
    found = find(manifests, "ConfigMap", source["configMapRef"]["name"])
    return dict(found["data"]) if found else {}


def arguments(manifests: Sequence[Manifest], container: Manifest) -> list[str]:
    """Arguments of a container, with $(NAME) replaced by the variable NAME."""
    values = environment(manifests, container)
    return [re.sub(r"\$\((\w+)\)", lambda match: values.get(match[1], match[0]), each) for each in container["args"]]
