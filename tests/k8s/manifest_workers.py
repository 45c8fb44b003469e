"""Checks of pods: images, devices, ranks, weights, secrets and start-up time."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from manifests import (
    FLEET_CONTAINER,
    ROOT,
    WORKLOADS,
    Manifest,
    Pod,
    arguments,
    environment,
    find,
    name_of,
    of_kind,
    pods,
)

TLS_FILES = frozenset({"tls.crt", "tls.key", "ca.crt"})
SECRETS_OF_USERS = {
    "fleet-redis": frozenset({"url", "ca.crt"}),
    "fleet-tls-coordinator": TLS_FILES,
    "fleet-tls-stage": TLS_FILES,
    "fleet-tls-keda": TLS_FILES,
}
"""Keys of the Secrets that users create, as the runbook in k8s/README.md describes."""

_DEGREES = ("tp", "ulysses", "ring", "cfg")
_KEDA_PARAMETERS = frozenset({"caCert", "tlsClientCert", "tlsClientKey"})  # parameters of KEDA's external scalers
_START_SECONDS = {"coordinator": 60.0}
_LOADING_SECONDS = 1_800.0  # a worker listens after its weights are loaded
_GPU = "nvidia.com/gpu"


def images(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Images are Dockerfile targets that suit the service; pods with a GPU have a CUDA image."""
    targets = set(re.findall(r" AS ([\w-]+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE))
    for pod in [each for each in pods(manifests) if each.container["name"] == FLEET_CONTAINER]:
        wanted = "coordinator" if pod.service == "coordinator" else "gpu" if _gpus(pod) else "cpu"
        if pod.container["image"].partition(":")[2] != wanted:
            yield f"{pod.owner}: image {pod.container['image']} is not diffusion-fleet:{wanted}"
        for container in pod.containers:
            name, _, target = container["image"].partition(":")
            if name != "diffusion-fleet" or target not in targets:
                yield f"{pod.owner}: image {container['image']} of {container['name']} is not a Dockerfile target"


def _gpus(pod: Pod) -> int:
    return int(pod.container.get("resources", {}).get("limits", {}).get(_GPU, 0))


def devices(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Only pods with GPUs have FLEET_DEVICE=cuda; a worker group has one rank per GPU."""
    for workload in of_kind(manifests, *WORKLOADS):
        nodes = workload["spec"].get("leaderWorkerTemplate", {}).get("size", 1)
        for pod in [each for each in pods([workload]) if each.service]:
            device = environment(manifests, pod.container).get("FLEET_DEVICE", "cpu")
            if (device == "cuda") != bool(_gpus(pod)):
                yield f"{pod.owner}: FLEET_DEVICE is {device} with {_gpus(pod)} GPUs"
            ranks = _ranks(arguments(manifests, pod.container))
            if _gpus(pod) and ranks != nodes * _gpus(pod):
                yield f"{pod.owner}: {ranks} ranks do not fit {nodes} nodes with {_gpus(pod)} GPUs each"


def _ranks(flags: Sequence[str]) -> int:
    """Product of the parallel degrees in flags of the form --NAME N or --NAME=N."""
    parts = [part for flag in flags for part in flag.split("=", 1)]
    given = dict(itertools.pairwise(parts))
    return math.prod(int(given.get(f"--{name}", "1")) for name in _DEGREES)


def weights(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Pods that serve a directory mount its claim read-only; an init container runs check_weights.sh."""
    for pod in [each for each in pods(manifests) if each.service]:
        claims = {each["name"] for each in pod.spec.get("volumes", []) if "persistentVolumeClaim" in each}
        if "/" not in environment(manifests, pod.container).get("FLEET_MODEL", ""):
            continue
        for container in pod.containers:
            mounts = [each for each in container.get("volumeMounts", []) if each["name"] in claims]
            if not mounts:
                yield f"{pod.owner}: container {container['name']} does not mount the weights"
            if not all(each.get("readOnly") for each in mounts):
                yield f"{pod.owner}: container {container['name']} mounts the weights writable"
        if not any(_checks_weights(manifests, pod, each) for each in pod.spec.get("initContainers", [])):
            yield f"{pod.owner}: no init container runs check_weights.sh"


def _checks_weights(manifests: Sequence[Manifest], pod: Pod, container: Manifest) -> bool:
    script = PurePosixPath(container["command"][-1])
    mounted = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    name = mounted.get(str(script.parent))
    volume: Manifest = next((each for each in pod.spec["volumes"] if each["name"] == name), {})
    config = find(manifests, "ConfigMap", volume.get("configMap", {}).get("name", ""))
    same_model = container.get("envFrom") == pod.container.get("envFrom")
    return config is not None and script.name in config["data"] and same_model


def secret_keys(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Used keys of Secrets (variables, files, KEDA parameters) are in the Secret or in SECRETS_OF_USERS."""
    for pod in pods(manifests):
        for container in pod.containers:
            sources = [each.get("valueFrom", {}).get("secretKeyRef") for each in container.get("env", [])]
            for source in filter(None, sources):
                yield from _lacks_key(manifests, pod.owner, source["name"], source["key"])
        yield from _secret_files(manifests, pod)
    for each in of_kind(manifests, "TriggerAuthentication"):
        for target in each["spec"]["secretTargetRef"]:
            yield from _lacks_key(manifests, name_of(each), target["name"], target["key"])
            if target["parameter"] not in _KEDA_PARAMETERS:
                yield f"{name_of(each)}: {target['parameter']} is not a parameter of an external scaler"


def _secret_files(manifests: Sequence[Manifest], pod: Pod) -> Iterator[str]:
    secrets = {each["name"]: each["secret"]["secretName"] for each in pod.spec.get("volumes", []) if "secret" in each}
    for mount in [each for each in pod.container["volumeMounts"] if each["name"] in secrets]:
        for value in environment(manifests, pod.container).values():
            if value.startswith(f"{mount['mountPath']}/"):
                yield from _lacks_key(manifests, pod.owner, secrets[mount["name"]], PurePosixPath(value).name)
        wanted = f"fleet-tls-{pod.labels['app.kubernetes.io/component']}"
        if mount["name"] == "tls" and secrets["tls"] != wanted:
            yield f"{pod.owner}: its certificate comes from the Secret {secrets['tls']}, not {wanted}"


def _lacks_key(manifests: Sequence[Manifest], owner: str, name: str, key: str) -> Iterator[str]:
    secret = find(manifests, "Secret", name)
    known = {*secret.get("data", {}), *secret.get("stringData", {})} if secret else SECRETS_OF_USERS.get(name, set())
    if key not in known:
        yield f"{owner}: Secret {name} has no {key}; it has {sorted(known)}"


def start_up(manifests: Sequence[Manifest]) -> Iterator[str]:
    """startupProbe allows enough time to load weights before the kubelet restarts the container."""
    for pod in [each for each in pods(manifests) if each.serves and each.service]:
        probe = pod.container.get("startupProbe", {})
        seconds = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
        needed = _START_SECONDS.get(pod.service, _LOADING_SECONDS)
        if seconds < needed:
            yield f"{pod.owner}: startupProbe allows {seconds} s, which is less than {needed:g} s"
