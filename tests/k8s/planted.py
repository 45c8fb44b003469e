"""Errors planted in rendered manifests, each with its check. They prove that the checks can fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from manifests import Manifest, find

Plant = Callable[[list[Manifest]], object]


@dataclass(frozen=True)
class Planted:
    """A change to an overlay's objects, and a part of the error that `check` must report."""

    check: str
    overlay: str
    error: str
    plant: Plant


def edit(kind: str, name: str, path: str, value: Any) -> Plant:
    """Set a value; `path` is keys and indices between slashes, with ~ for a slash in a key."""

    def plant(manifests: list[Manifest]) -> None:
        parent, last = _at(manifests, kind, name, path)
        parent[last] = value

    return plant


def drop(kind: str, name: str, path: str = "") -> Plant:
    """Remove a value, or a whole object."""

    def plant(manifests: list[Manifest]) -> None:
        if not path:
            manifests[:] = [each for each in manifests if (each["kind"], each["metadata"]["name"]) != (kind, name)]
            return
        parent, last = _at(manifests, kind, name, path)
        del parent[last]

    return plant


def append(kind: str, name: str, path: str, value: Any) -> Plant:
    """Add an item to a list."""

    def plant(manifests: list[Manifest]) -> None:
        parent, last = _at(manifests, kind, name, path)
        parent[last].append(value)

    return plant


def _at(manifests: Sequence[Manifest], kind: str, name: str, path: str) -> tuple[Any, Any]:
    parent: Any = find(manifests, kind, name)
    assert parent is not None, f"{kind}/{name} does not exist"
    *keys, last = [int(key) if key.isdecimal() else key.replace("~", "/") for key in path.split("/")]
    for key in keys:
        parent = parent[key]
    return parent, last


def set_shared(name: str, value: str) -> Plant:
    """Set a variable of the shared ConfigMap."""

    def plant(manifests: list[Manifest]) -> None:
        for each in manifests:
            if each["kind"] == "ConfigMap" and "FLEET_MODEL" in each["data"]:
                each["data"][name] = value

    return plant


def add_hpa(manifests: list[Manifest]) -> None:
    """Add an HPA next to the ScaledObject of denoising."""
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "denoising"}
    spec = {"scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 2, "metrics": []}
    manifests.append(
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "second-scaler"},
            "spec": spec,
        }
    )


POD = "spec/template/spec"
CONTAINER = f"{POD}/containers/0"
_TRIGGER = "spec/triggers/0/metadata"
_ROLE = "spec/roles/0/spec/leaderWorkerTemplate/workerTemplate/spec"
LEADER = "spec/leaderWorkerTemplate/leaderTemplate/spec"
_D, _NP, _SO = "Deployment", "NetworkPolicy", "ScaledObject"
_HPA = "HorizontalPodAutoscaler"
_LABEL = "app.kubernetes.io/name"
_VERSION = "app.kubernetes.io~version"

PLANTED = [
    Planted("selectors", "dev", "own pods", edit(_D, "denoising", "spec/selector/matchLabels/x", "y")),
    Planted("selectors", "dev", "no pod", edit("Service", "redis", "spec/selector", {_LABEL: "rediss"})),
    Planted(
        "selectors", "dev", "no pod", edit("PodDisruptionBudget", "decoding", "spec/selector/matchLabels", {"a": "b"})
    ),
    Planted(
        "selectors",
        "dev",
        "topologySpread",
        edit(_D, "decoding", f"{POD}/topologySpreadConstraints/0/labelSelector/matchLabels", {"a": "b"}),
    ),
    Planted("ports", "dev", "targetPort", edit("Service", "coordinator", "spec/ports/0/targetPort", "grcp")),
    Planted(
        "ports",
        "production",
        "not a port of a Service",
        edit("GRPCRoute", "api", "spec/rules/0/backendRefs/0/port", 50052),
    ),
    Planted(
        "scraping",
        "production",
        "coordinator is scraped 0 times",
        edit("ServiceMonitor", "fleet", "spec/endpoints/0/port", "metric"),
    ),
    Planted("scraping", "production", "decoding is scraped 0 times", drop("Service", "decoding")),
    Planted(
        "scraping",
        "production",
        "coordinator is scraped 2 times",
        append("Service", "coordinators", "spec/ports", {"name": "metrics", "port": 9090, "targetPort": "metrics"}),
    ),
    Planted("scraping", "production", "honorLabels", drop("ServiceMonitor", "fleet", "spec/endpoints/0/honorLabels")),
    Planted("probes", "dev", "no startupProbe", drop(_D, "decoding", f"{CONTAINER}/startupProbe")),
    Planted(
        "probes",
        "dev",
        "asks for 'fleet.v1.Denoising'",
        edit(_D, "denoising", f"{CONTAINER}/readinessProbe/grpc/service", "fleet.v1.Denoising"),
    ),
    Planted(
        "probes", "dev", "not a container port", edit(_D, "denoising", f"{CONTAINER}/readinessProbe/grpc/port", 50055)
    ),
    Planted(
        "probes", "dev", "not a container port", edit(_D, "redis", f"{CONTAINER}/livenessProbe/tcpSocket/port", "rdis")
    ),
    Planted(
        "probes",
        "dev",
        "livenessProbe must ask",
        edit(_D, "coordinator", f"{CONTAINER}/livenessProbe/grpc/service", "fleet.v1.GenerationService"),
    ),
    Planted(
        "probes",
        "multi-node",
        "asks for",
        edit("LeaderWorkerSet", "denoising", f"{LEADER}/containers/0/startupProbe/grpc/service", "x"),
    ),
    Planted(
        "routes",
        "production",
        "is not served",
        edit("GRPCRoute", "api", "spec/rules/0/matches/0/method/service", "fleet.v1.Generation"),
    ),
    Planted("routes", "production", "no route for", drop("GRPCRoute", "reflection")),
    Planted(
        "settings",
        "dev",
        "FLEET_CAPASITY is not",
        append(_D, "denoising", f"{CONTAINER}/env", {"name": "FLEET_CAPASITY", "value": "2"}),
    ),
    Planted("settings", "dev", "FLEET_WARMUP is not read by any", set_shared("FLEET_WARMUP", "512x512")),
    Planted(
        "settings",
        "dev",
        "unrecognized",
        edit(_D, "denoising", f"{CONTAINER}/args", ["denoising", "--tensor-parallel", "2"]),
    ),
    Planted("settings", "dev", "FLEET_THREADS", set_shared("FLEET_THREADS", "two")),
    Planted("settings", "dev", "is not a service", edit(_D, "denoising", f"{CONTAINER}/args", ["denoise"])),
    Planted(
        "settings",
        "multi-node",
        "node-rank",
        edit("LeaderWorkerSet", "denoising", f"{LEADER}/containers/0/args/4", "--node-rank=$(LWS_INDEX)"),
    ),
    Planted("listening", "dev", "listens on", set_shared("FLEET_METRICS_PORT", "9091")),
    Planted("listening", "keda", "listens on", edit(_D, "coordinator", f"{CONTAINER}/env/0/value", "0.0.0.0:50054")),
    Planted("grace", "dev", "is below", set_shared("FLEET_GRACE_SECONDS", "60")),
    Planted("grace", "dev", "is below", edit(_D, "coordinator", f"{CONTAINER}/lifecycle/preStop/sleep/seconds", 20)),
    Planted("grace", "gpu-group", "is below", edit(_D, "denoising", f"{POD}/terminationGracePeriodSeconds", 45)),
    Planted(
        "references",
        "dev",
        "ConfigMap fleet does not exist",
        edit(_D, "denoising", f"{CONTAINER}/envFrom/0/configMapRef/name", "fleet"),
    ),
    Planted("references", "dev", "PersistentVolumeClaim redis", drop("PersistentVolumeClaim", "redis")),
    Planted("references", "dev", "ServiceAccount decoding", drop("ServiceAccount", "decoding")),
    Planted(
        "references",
        "dev",
        "not one of its volumes",
        append(_D, "decoding", f"{CONTAINER}/volumeMounts", {"name": "kernel", "mountPath": "/k"}),
    ),
    Planted(
        "references",
        "production",
        "Secret fleet-tls",
        edit(_D, "decoding", f"{POD}/volumes/0/secret/secretName", "fleet-tls"),
    ),
    Planted("paths", "gpu", "not on a mounted volume", set_shared("FLEET_KERNEL_CACHE", "/var/kernels")),
    Planted("paths", "gpu", "not on a mounted volume", set_shared("FLEET_MODEL", "flux=/weights/FLUX.1-dev")),
    Planted("paths", "production", "FLEET_TLS_CERT names", set_shared("FLEET_TLS_CERT", "/etc/tls/tls.crt")),
    Planted("security", "dev", "runAsNonRoot", edit(_D, "redis", f"{POD}/securityContext/runAsNonRoot", False)),
    Planted(
        "security",
        "dev",
        "readOnlyRootFilesystem",
        drop(_D, "redis", f"{CONTAINER}/securityContext/readOnlyRootFilesystem"),
    ),
    Planted(
        "security",
        "dev",
        "capabilities",
        edit(_D, "decoding", f"{CONTAINER}/securityContext/capabilities", {"drop": []}),
    ),
    Planted("security", "dev", "seccompProfile", drop(_D, "decoding", f"{POD}/securityContext/seccompProfile")),
    Planted("security", "dev", "limits", drop(_D, "decoding", f"{CONTAINER}/resources/limits/memory")),
    Planted("security", "dev", "automount", drop("ServiceAccount", "decoding", "automountServiceAccountToken")),
    Planted(
        "security",
        "gpu",
        "check-weights",
        drop(_D, "decoding", f"{POD}/initContainers/0/securityContext/capabilities"),
    ),
    Planted(
        "security",
        "disaggregatedset",
        "allowPrivilege",
        edit("DisaggregatedSet", "fleet", f"{_ROLE}/containers/0/securityContext/allowPrivilegeEscalation", True),
    ),
    Planted("images", "gpu", "diffusion-fleet:gpu", edit(_D, "denoising", f"{CONTAINER}/image", "diffusion-fleet:cpu")),
    Planted("labels", "dev", "lacks", drop(_D, "denoising", "metadata/labels")),
    Planted("labels", "dev", "fleet: lacks", drop("Namespace", "diffusion-fleet", "metadata/labels")),
    Planted(
        "labels",
        "dev",
        "pod of Deployment/redis: lacks ['app.kubernetes.io/instance']",
        drop(_D, "redis", "spec/template/metadata/labels/app.kubernetes.io~instance"),
    ),
    Planted(
        "labels",
        "multi-node",
        "denoising leader: app.kubernetes.io/version of workload and pod are",
        edit(
            "LeaderWorkerSet", "denoising", "spec/leaderWorkerTemplate/leaderTemplate/metadata/labels/" + _VERSION, "0"
        ),
    ),
    Planted("labels", "dev", "('6', '7'), not 7", edit(_D, "redis", f"metadata/labels/{_VERSION}", "6")),
    Planted("labels", "keda", "namespace", drop(_SO, "denoising", "metadata/namespace")),
    Planted("kinds", "dev", "PodDisruptionBudget decoding", drop("PodDisruptionBudget", "decoding")),
    Planted("stages", "dev", "emoji needs", drop(_D, "decoding")),
    Planted("scale_targets", "keda", "does not exist", edit(_SO, "denoising", "spec/scaleTargetRef/name", "denoise")),
    Planted(
        "scale_targets", "keda", "its target runs denoising", edit(_SO, "denoising", f"{_TRIGGER}/stage", "decoding")
    ),
    Planted(
        "scale_targets",
        "disaggregatedset",
        "does not exist",
        edit(_SO, "denoising", "spec/scaleTargetRef/name", "denoising"),
    ),
    Planted(
        "scale_targets",
        "disaggregatedset",
        "does not exist",
        edit("DisaggregatedSet", "fleet", "spec/roles/0/scaling/mode", "Static"),
    ),
    Planted("scaled_once", "keda", "has 2 scalers", add_hpa),
    Planted("scaled_once", "keda", "has replicas", edit(_D, "decoding", "spec/replicas", 1)),
    Planted("scaled_once", "keda", "nor a scaler", drop(_SO, "decoding")),
    Planted("scaled_once", "keda", "idleReplicaCount", edit(_SO, "decoding", "spec/idleReplicaCount", 0)),
    Planted(
        "triggers",
        "keda",
        "not NAME.NAMESPACE.svc",
        edit(_SO, "decoding", f"{_TRIGGER}/scalerAddress", "scaler.diffusion-fleet.svc:50053"),
    ),
    Planted(
        "triggers",
        "keda",
        "is not the scaler port",
        edit(_SO, "decoding", f"{_TRIGGER}/scalerAddress", "coordinator-scaler.diffusion-fleet.svc:50051"),
    ),
    Planted("triggers", "keda", "model emojis", edit(_SO, "decoding", f"{_TRIGGER}/model", "emojis")),
    Planted(
        "triggers", "keda", "no stage image_encoding", edit(_SO, "decoding", f"{_TRIGGER}/stage", "image_encoding")
    ),
    Planted("triggers", "keda", "targetSeconds", edit(_SO, "decoding", f"{_TRIGGER}/targetSeconds", "0")),
    Planted("triggers", "keda", "metricName", edit(_SO, "decoding", f"{_TRIGGER}/metricName", "seconds")),
    Planted("formulas", "production", "reads wanted, but", edit(_SO, "decoding", "spec/triggers/0/name", "seconds")),
    Planted("formulas", "production", "its target is 30", edit(_SO, "decoding", f"{_TRIGGER}/targetSeconds", "20")),
    Planted("triggers", "production", "TriggerAuthentication", drop("TriggerAuthentication", "fleet-scaler")),
    Planted(
        "triggers",
        "hpa",
        "model emojis",
        edit(_HPA, "decoding", "spec/metrics/0/external/metric/selector/matchLabels/model", "emojis"),
    ),
    Planted(
        "metric_names",
        "hpa",
        "fleet_queue_seconds",
        edit(_HPA, "decoding", "spec/metrics/0/external/metric/name", "fleet_queue_seconds"),
    ),
    Planted(
        "metric_names",
        "production",
        "fleet_stored",
        edit("PrometheusRule", "fleet", "spec/groups/0/rules/0/expr", "fleet_stored > 1"),
    ),
    Planted(
        "metric_names", "keda-prometheus", "fleet_queue_s", edit(_SO, "decoding", f"{_TRIGGER}/query", "fleet_queue_s")
    ),
    Planted(
        "scale_targets",
        "keda-prometheus",
        "runs decoding",
        edit(_SO, "decoding", f"{_TRIGGER}/query", 'a{service="denoising"}'),
    ),
    Planted("admitted_ports", "dev", "are not ports", edit(_NP, "decoding", "spec/ingress/0/ports/0/port", 50061)),
    Planted("admitted_ports", "dev", "egress port 6380", edit(_NP, "decoding", "spec/egress/0/ports/0/port", 6380)),
    Planted("admitted_ports", "dev", "allows any peer", drop(_NP, "decoding", "spec/ingress/0/from")),
    Planted(
        "admitted_ports",
        "keda",
        "other than KEDA",
        edit(_NP, "coordinator-scaler", "spec/ingress/0/from/0", {"podSelector": {}}),
    ),
    Planted(
        "dangling_peers",
        "dev",
        "matches no pod",
        edit(_NP, "redis", "spec/ingress/0/from/0/podSelector", {"matchLabels": {"a": "b"}}),
    ),
    Planted("unselected_pods", "dev", "no NetworkPolicy", drop(_NP, "decoding")),
    Planted("unselected_pods", "dev", "type Egress", edit(_NP, "decoding", "spec/policyTypes", ["Ingress"])),
    Planted("flows", "dev", "cannot connect to Deployment/redis", edit(_NP, "decoding", "spec/egress", [])),
    Planted("flows", "dev", "which is not needed", append(_NP, "coordinator", "spec/egress/0/ports", {"port": 50052})),
    Planted("flows", "multi-node", "cannot connect", drop(_NP, "denoising-ranks")),
]
