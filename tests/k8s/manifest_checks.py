"""Semantic checks of rendered manifests, beyond schemas. Each takes an overlay's objects and yields errors.

CHECKS has all checks by name. Checks of scalers, workers and the network are in separate modules.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from manifest_network import admitted_ports, dangling_peers, flows, outside_flows, unselected_pods
from manifest_scalers import formulas, metric_names, scale_targets, scaled_once, triggers
from manifest_workers import SECRETS_OF_USERS, devices, images, secret_keys, start_up, weights
from manifests import (
    FLEET_CONTAINER,
    ROOT,
    SERVICES,
    WORKLOADS,
    Manifest,
    Pod,
    arguments,
    environment,
    find,
    matches,
    name_of,
    of_kind,
    pods,
    shared_variables,
)
from opentelemetry.sdk import environment_variables

from common.errors import InvalidInput
from common.settings import load_settings
from models.catalog import open_model, shipped_models
from models.registry import load_registry
from services.cli.serve import settings_class

Check = Callable[[Sequence[Manifest]], Iterator[str]]

HEALTH_SERVICE = "grpc.health.v1.Health"
KNOWN_SERVICES = frozenset({HEALTH_SERVICE, "grpc.reflection.v1alpha.ServerReflection"})
_OTEL_VARIABLES = frozenset(name for name in vars(environment_variables) if name.startswith("OTEL_"))
RECOMMENDED_LABELS = frozenset(
    f"app.kubernetes.io/{name}" for name in ("name", "instance", "component", "part-of", "managed-by")
)
NAME_LABEL = "app.kubernetes.io/name"
VERSION_LABEL = "app.kubernetes.io/version"
"""Label of workloads and pods; other objects are equal for all versions."""

_FINISH_SECONDS = 5.0  # from the end of grace_seconds to the exit of a process
_AGENT_SECONDS = 11.0  # from the end of the ranks' grace_seconds to the exit of their agent
_CLUSTER_WIDE = frozenset({"Namespace"})


def selectors(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Selectors match existing pods; Services and PodDisruptionBudgets match no pods of another service."""
    for each in of_kind(manifests, "Deployment"):
        if not matches(each["spec"]["selector"], each["spec"]["template"]["metadata"]["labels"]):
            yield f"{name_of(each)}: selector does not match its own pods"
    templates = pods(manifests)
    for each in of_kind(manifests, "Service", "PodDisruptionBudget", "NetworkPolicy"):
        if not any(matches(_selector(each), pod.labels) for pod in templates):
            yield f"{name_of(each)}: selector matches no pod"
    for each in of_kind(manifests, "Service", "PodDisruptionBudget"):
        for pod in [pod for pod in templates if matches(_selector(each), pod.labels)]:
            if pod.labels[NAME_LABEL] != each["metadata"].get("labels", {}).get(NAME_LABEL):
                yield f"{name_of(each)}: selector matches {pod.owner}, which belongs to another service"
    for pod in templates:
        for spread in pod.spec.get("topologySpreadConstraints", []):
            if not matches(spread["labelSelector"], pod.labels):
                yield f"{pod.owner}: topologySpreadConstraints do not select its own pods"


def _selector(manifest: Manifest) -> Manifest:
    spec = manifest["spec"]
    if manifest["kind"] == "Service":
        return {"matchLabels": spec["selector"]}
    selector: Manifest = spec["podSelector" if manifest["kind"] == "NetworkPolicy" else "selector"]
    return selector


def ports(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Target ports of Services are container ports; backend ports of routes are ports of Services."""
    for service in of_kind(manifests, "Service"):
        for pod in [each for each in pods(manifests) if each.serves and matches(_selector(service), each.labels)]:
            for port in service["spec"]["ports"]:
                target = port.get("targetPort", port["port"])
                if target not in pod.ports and target not in pod.ports.values():
                    yield f"{name_of(service)}: targetPort {target} is not a port of {pod.owner}"
    for route in of_kind(manifests, "GRPCRoute"):
        for backend in [backend for rule in route["spec"]["rules"] for backend in rule["backendRefs"]]:
            service_ = find(manifests, "Service", backend["name"])
            if service_ is None or backend["port"] not in [port["port"] for port in service_["spec"]["ports"]]:
                yield f"{name_of(route)}: {backend['name']}:{backend['port']} is not a port of a Service"


def scraping(manifests: Sequence[Manifest]) -> Iterator[str]:
    """ServiceMonitors scrape each server of the fleet once, and preserve the fleet's label `service`."""
    for monitor in of_kind(manifests, "ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            if endpoint.get("honorLabels") is not True:
                yield f"{name_of(monitor)}: without honorLabels, Kubernetes overrides the label service"
            services = [
                each
                for each in of_kind(manifests, "Service")
                if matches(monitor["spec"]["selector"], each["metadata"]["labels"])
                and any(port.get("name") == endpoint["port"] for port in each["spec"]["ports"])
            ]
            for pod in [each for each in pods(manifests) if each.serves and each.service]:
                times = sum(matches(_selector(each), pod.labels) for each in services)
                if times != 1:
                    yield f"{name_of(monitor)}: {pod.owner} is scraped {times} times"


def balancing(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Every service has a headless Service, for client-side balancing; gRPC ports have an appProtocol."""
    for pod in [each for each in pods(manifests) if each.serves and each.service]:
        services = [
            each for each in of_kind(manifests, "Service") if matches(_selector(each), pod.labels) and _grpc_port(each)
        ]
        if not any(each["spec"].get("clusterIP") == "None" for each in services):
            yield f"{pod.owner}: has no headless Service"
        tls = "FLEET_TLS_CERT" in environment(manifests, pod.container)
        for service in [each for each in services if each["metadata"]["name"] == pod.labels[NAME_LABEL]]:
            wanted, found = "https" if tls else "kubernetes.io/h2c", _grpc_port(service).get("appProtocol")
            if found != wanted:
                yield f"{name_of(service)}: appProtocol is {found}, not {wanted}"


def _grpc_port(service: Manifest) -> Manifest:
    return next((each for each in service["spec"]["ports"] if each["name"] == "grpc"), {})


def disruptions(manifests: Sequence[Manifest]) -> Iterator[str]:
    """maxUnavailable is 1, because 0 would block the draining of a node."""
    for each in of_kind(manifests, "PodDisruptionBudget"):
        if each["spec"].get("maxUnavailable") != 1 or "minAvailable" in each["spec"]:
            yield f"{name_of(each)}: maxUnavailable is not 1"


def probes(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Every server has three probes on its ports; gRPC liveness does not depend on a service's status."""
    for pod in [each for each in pods(manifests) if each.serves]:
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = pod.container.get(kind)
            if probe is None:
                yield f"{pod.owner}: has no {kind}"
            elif "grpc" in probe:
                yield from _grpc_probe(pod, kind, probe["grpc"])
            elif "tcpSocket" in probe and probe["tcpSocket"]["port"] not in {*pod.ports, *pod.ports.values()}:
                yield f"{pod.owner}: {kind} uses port {probe['tcpSocket']['port']}, which is not a container port"


def _grpc_probe(pod: Pod, kind: str, probe: Manifest) -> Iterator[str]:
    known = {HEALTH_SERVICE, *(_services_of(pod.service))}
    if probe["port"] not in pod.ports.values():
        yield f"{pod.owner}: {kind} uses port {probe['port']}, which is not a container port"
    if probe.get("service") not in known:
        yield f"{pod.owner}: {kind} asks for {probe.get('service')!r}; its services are {sorted(known)}"
    if (kind == "livenessProbe") != (probe.get("service") == HEALTH_SERVICE) and kind != "startupProbe":
        yield f"{pod.owner}: {kind}: livenessProbe must ask for {HEALTH_SERVICE}, readinessProbe must not"


def _services_of(service: str) -> list[str]:
    """gRPC services of a process, from the protos, for which its health service has a status."""
    if service == "coordinator":
        return proto_services("generation")
    return proto_services(service) + proto_services("worker")


def proto_services(proto: str) -> list[str]:
    """Full names of the services in a file of proto/fleet/v1; empty if the file does not exist."""
    path = ROOT / "proto" / "fleet" / "v1" / f"{proto}.proto"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [f"fleet.v1.{name}" for name in re.findall(r"^service (\w+)", text, re.MULTILINE)]


def routes(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Routes name exactly the gRPC services of the coordinator, including health and reflection."""
    known = {*proto_services("generation"), *KNOWN_SERVICES}
    named = [
        (route, match["method"]["service"])
        for route in of_kind(manifests, "GRPCRoute")
        for rule in route["spec"]["rules"]
        for match in rule["matches"]
    ]
    yield from (f"{name_of(route)}: {name} is not served" for route, name in named if name not in known)
    if named and (lacking := known - {name for _, name in named}):
        yield f"GRPCRoute: no route for {sorted(lacking)}"


def settings(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Flags and variables are settings of their service, with valid values."""
    readers: dict[str, list[frozenset[str]]] = {}
    for pod in [each for each in pods(manifests) if each.service]:
        if pod.service not in SERVICES:
            yield f"{pod.owner}: {pod.service} is not a service; services are {sorted(SERVICES)}"
            continue
        read = frozenset(f"FLEET_{name.upper()}" for name in settings_class(pod.service).__dataclass_fields__)
        read |= _OTEL_VARIABLES
        for each in pod.container.get("env", []):
            if each["name"] not in read:
                yield f"{pod.owner}: {each['name']} is not a setting of {pod.service}"
        for source in pod.container.get("envFrom", []):
            for name in shared_variables(manifests, source):
                readers.setdefault(name, []).append(read)
        try:
            _load(manifests, pod)
        except InvalidInput as error:
            yield f"{pod.owner}: {error.message}"
    yield from (
        f"{name} is not read by any service" for name, sets in readers.items() if not any(name in s for s in sets)
    )


def _load(manifests: Sequence[Manifest], pod: Pod) -> Mapping[str, object]:
    """Settings of the pod's process, by name. Raises InvalidInput."""
    flags = arguments(manifests, pod.container)[1:]
    environ = environment(manifests, pod.container)
    return dict(vars(load_settings(settings_class(pod.service), flags, prog=pod.service, environ=environ)))


def listening(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Container ports of serving pods equal the ports of their settings."""
    for pod in _readable(manifests):
        values = _load(manifests, pod)
        where = {"grpc": values["listen"], "health": values["health_listen"], "metrics": f":{values['metrics_port']}"}
        where["scaler"] = values.get("scaler_listen", "")
        for name, port in pod.ports.items():
            if name in where and str(where[name]).rpartition(":")[2] != str(port):
                yield f"{pod.owner}: port {name} is {port}, but it listens on {where[name]!r}"


def grace(manifests: Sequence[Manifest]) -> Iterator[str]:
    """terminationGracePeriodSeconds is longer than preStop plus grace_seconds."""
    for pod in [*_readable(manifests), *[each for each in pods(manifests) if not each.serves]]:
        values = _load(manifests, pod)
        before = pod.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        ranks = [str(values.get(axis, 1)) for axis in ("tp", "ulysses", "ring", "cfg")]
        agent = _AGENT_SECONDS if set(ranks) != {"1"} else 0.0
        needed = before + float(str(values["grace_seconds"])) + agent + _FINISH_SECONDS
        if pod.spec["terminationGracePeriodSeconds"] < needed:
            yield f"{pod.owner}: terminationGracePeriodSeconds is below the {needed:g} s of preStop and grace_seconds"


def _readable(manifests: Sequence[Manifest]) -> list[Pod]:
    """Serving pods of the fleet with valid settings; settings() reports invalid settings."""
    found = []
    for pod in [each for each in pods(manifests) if each.serves and each.service in SERVICES]:
        try:
            _load(manifests, pod)
        except InvalidInput:
            continue
        found.append(pod)
    return found


def references(manifests: Sequence[Manifest]) -> Iterator[str]:
    """ConfigMaps, Secrets, claims, ServiceAccounts and mounted volumes of pods exist."""
    for pod in pods(manifests):
        named = [("ServiceAccount", pod.spec["serviceAccountName"])]
        for volume in pod.spec.get("volumes", []):
            named += [("ConfigMap", volume["configMap"]["name"])] if "configMap" in volume else []
            named += [("Secret", volume["secret"]["secretName"])] if "secret" in volume else []
            claim = volume.get("persistentVolumeClaim")
            named += [("PersistentVolumeClaim", claim["claimName"])] if claim else []
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        for container in pod.containers:
            named += [("ConfigMap", each["configMapRef"]["name"]) for each in container.get("envFrom", [])]
            sources = [each.get("valueFrom", {}).get("secretKeyRef") for each in container.get("env", [])]
            named += [("Secret", source["name"]) for source in sources if source]
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            yield from (
                f"{pod.owner}: mounts {name}, which is not one of its volumes" for name in sorted(mounted - volumes)
            )
        for kind, name in named:
            users = kind == "Secret" and name in SECRETS_OF_USERS
            if not users and find(manifests, kind, name) is None:
                yield f"{pod.owner}: {kind} {name} does not exist"


def paths(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Files and directories in settings are on a mounted volume."""
    for pod in [each for each in pods(manifests) if each.service in SERVICES]:
        mounts = [mount["mountPath"] for mount in pod.container["volumeMounts"]]
        for name, value in environment(manifests, pod.container).items():
            path = value.partition("=")[2] if "=/" in value else value
            is_read = name.removeprefix("FLEET_").lower() in settings_class(pod.service).__dataclass_fields__
            mounted = any(path == each or path.startswith(f"{each}/") for each in mounts)
            if path.startswith("/") and is_read and not mounted:
                yield f"{pod.owner}: {name} names {path}, which is not on a mounted volume"


def security(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Every pod and container satisfies the Pod Security Standard `restricted` and further rules."""
    for account in of_kind(manifests, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{name_of(account)}: automountServiceAccountToken is not false"
    for pod in pods(manifests):
        context = pod.spec.get("securityContext", {})
        wanted = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
        for name, value in wanted.items():
            if context.get(name) != value:
                yield f"{pod.owner}: securityContext.{name} is not {value}"
        for name in ("automountServiceAccountToken", "enableServiceLinks"):
            if pod.spec.get(name) is not False:
                yield f"{pod.owner}: {name} is not false"
        for container in pod.containers:
            yield from (f"{pod.owner}: container {container['name']}: {each}" for each in _insecure(container))


def _insecure(container: Manifest) -> Iterator[str]:
    context, resources = container.get("securityContext", {}), container.get("resources", {})
    wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    for name, value in wanted.items():
        if context.get(name) != value:
            yield f"securityContext.{name} is not {value}"
    for kind in ("requests", "limits"):
        if not {"cpu", "memory"} <= set(resources.get(kind, {})):
            yield f"resources.{kind} lacks cpu or memory"


def labels(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Objects have the recommended labels and the fleet's namespace; version labels equal _version_of()."""
    found = {name_of(each): each["metadata"].get("labels", {}) for each in manifests}
    found |= {f"pod of {pod.owner}": pod.labels for pod in pods(manifests)}
    for owner, names in found.items():
        if lacking := RECOMMENDED_LABELS - names.keys():
            yield f"{owner}: lacks {sorted(lacking)}"
    for workload in of_kind(manifests, *WORKLOADS):
        for pod in pods([workload]):
            versions = (found[name_of(workload)].get(VERSION_LABEL), pod.labels.get(VERSION_LABEL))
            if versions != (wanted := _version_of(pod),) * 2:
                yield f"{pod.owner}: {VERSION_LABEL} of workload and pod are {versions}, not {wanted}"
    for each in manifests:
        if each["kind"] not in _CLUSTER_WIDE and each["metadata"].get("namespace") != "diffusion-fleet":
            yield f"{name_of(each)}: is not in the namespace diffusion-fleet"


def _version_of(pod: Pod) -> str:
    """Version of the project, or the tag of a third-party image."""
    if pod.container["name"] != FLEET_CONTAINER:
        return str(pod.container["image"].rpartition(":")[2])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def kinds(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Each service has a Service, ServiceAccount, PodDisruptionBudget and NetworkPolicy with its name."""
    for pod in pods(manifests):
        name = pod.labels[NAME_LABEL]
        if pod.spec["serviceAccountName"] != name:
            yield f"{pod.owner}: runs as the ServiceAccount {pod.spec['serviceAccountName']}, not {name}"
        for kind in ("Service", "ServiceAccount", "PodDisruptionBudget", "NetworkPolicy"):
            if find(manifests, kind, name) is None:
                yield f"{pod.owner}: there is no {kind} {name}"


def stages(manifests: Sequence[Manifest]) -> Iterator[str]:
    """A fleet that serves a shipped model has exactly the stages of this model."""
    running = {pod.service for pod in pods(manifests) if pod.service} - {"coordinator"}
    references_ = [str(each["data"].get("FLEET_MODEL", "")) for each in of_kind(manifests, "ConfigMap")]
    for model in [each for each in references_ if each in shipped_models()]:
        wanted = {spec.service for spec in open_model(model, load_registry()).services}
        if running != wanted:
            yield f"{model} needs {sorted(wanted)}, not {sorted(running)}"


CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        each.__name__: each
        for each in (
            selectors,
            ports,
            scraping,
            balancing,
            disruptions,
            probes,
            start_up,
            routes,
            settings,
            listening,
            grace,
            references,
            secret_keys,
            weights,
            devices,
            paths,
            security,
            images,
            labels,
            kinds,
            stages,
            scale_targets,
            scaled_once,
            triggers,
            formulas,
            metric_names,
            admitted_ports,
            dangling_peers,
            unselected_pods,
            flows,
            outside_flows,
        )
    }
)
