"""Checks of NetworkPolicies: they allow exactly the fleet's connections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from manifests import Manifest, Pod, environment, matches, name_of, of_kind, pods

KEDA = {"kubernetes.io/metadata.name": "keda"}
MONITORING = {"kubernetes.io/metadata.name": "monitoring"}
DNS = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
    "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
}
_REDIS_PORTS = frozenset({6379, 6380})
_OPEN_TO_ALL = {"coordinator": {"grpc", "health"}}  # public API; all other pods accept only health checks from any peer


def admitted_ports(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Ports of policies are container ports; rules without peers allow only health checks and the API."""
    for policy in of_kind(manifests, "NetworkPolicy"):
        for pod in _selected(manifests, policy):
            for rule in policy["spec"].get("ingress", []):
                yield from _ingress_errors(policy, pod, rule)
        for rule in policy["spec"].get("egress", []):
            for pod in [each for each in pods(manifests) if each.serves and _is_peer(rule.get("to", []), each.labels)]:
                for port in rule.get("ports", []):
                    if port["port"] not in pod.ports.values():
                        yield f"{name_of(policy)}: egress port {port['port']} is not a port of {pod.owner}"


def _ingress_errors(policy: Manifest, pod: Pod, rule: Manifest) -> Iterator[str]:
    numbers = {port["port"] for port in rule.get("ports", [])}
    if pod.serves and (lacking := numbers - set(pod.ports.values())):
        yield f"{name_of(policy)}: ingress ports {sorted(lacking)} are not ports of {pod.owner}"
    names = {name for name, port in pod.ports.items() if port in numbers or not numbers}
    if not rule.get("from") and (wrong := names - _OPEN_TO_ALL.get(pod.service, {"health"})):
        yield f"{name_of(policy)}: allows any peer to connect to {sorted(wrong)} of {pod.owner}"
    if "scaler" in names and [peer.get("namespaceSelector", {}).get("matchLabels") for peer in rule["from"]] != [KEDA]:
        yield f"{name_of(policy)}: allows namespaces other than KEDA's to connect to the scaler"


def dangling_peers(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Every peer in the fleet's namespace matches an existing pod."""
    for policy in of_kind(manifests, "NetworkPolicy"):
        rules = [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]
        for peer in [peer for rule in rules for peer in [*rule.get("from", []), *rule.get("to", [])]]:
            own = "podSelector" in peer and "namespaceSelector" not in peer
            if own and not any(matches(peer["podSelector"], pod.labels) for pod in pods(manifests)):
                yield f"{name_of(policy)}: peer {peer['podSelector']} matches no pod"


def unselected_pods(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Every pod has policies of both directions, which deny all other connections."""
    for pod in pods(manifests):
        for direction in ("Ingress", "Egress"):
            if not _policies(manifests, pod, direction):
                yield f"{pod.owner}: no NetworkPolicy of type {direction} selects it"


def flows(manifests: Sequence[Manifest]) -> Iterator[str]:
    """The fleet's connections are allowed at both ends, and no other connections between its pods."""
    templates = pods(manifests)
    for source in templates:
        for target in templates:
            for name, port in target.ports.items():
                needed = _is_needed(source, target, name)
                admitted = _admits(manifests, source, target, port)
                if needed and not admitted:
                    yield f"{source.owner} cannot connect to {target.owner}:{name}"
                if admitted and not needed:
                    yield f"{source.owner} can connect to {target.owner}:{name}, which is not needed"


def outside_flows(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Policies allow connections to DNS, a managed Redis and a collector, and from KEDA and Prometheus."""
    templates = [pod for pod in pods(manifests) if pod.service]
    in_cluster = any(pod.container["name"] == "redis" for pod in pods(manifests))
    for pod in templates:
        out = [rule for policy in _policies(manifests, pod, "Egress") for rule in policy["spec"].get("egress", [])]
        resolved = {
            (port["port"], port.get("protocol", "TCP"))
            for rule in out
            if DNS in rule.get("to", [])
            for port in rule.get("ports", [])
        }
        if resolved != {(53, "UDP"), (53, "TCP")}:
            yield f"{pod.owner}: cannot connect to DNS at port 53 of UDP and TCP"
        blocks = [rule for rule in out if any("ipBlock" in peer for peer in rule.get("to", []))]
        reached = {port["port"] for rule in blocks for port in rule.get("ports", [])}
        if not in_cluster and not reached & _REDIS_PORTS:
            yield f"{pod.owner}: cannot connect to a Redis outside the namespace"
        collector = urlsplit(environment(manifests, pod.container).get("OTEL_EXPORTER_OTLP_ENDPOINT", ""))
        if collector.hostname and not _reaches(out, collector.hostname, collector.port):
            yield f"{pod.owner}: cannot connect to the collector {collector.netloc}"
        if "scaler" in pod.ports and not _is_admitted(manifests, pod, "scaler", KEDA):
            yield f"{pod.owner}: KEDA cannot connect to its scaler"
        if (
            of_kind(manifests, "ServiceMonitor")
            and pod.serves
            and not _is_admitted(manifests, pod, "metrics", MONITORING)
        ):
            yield f"{pod.owner}: Prometheus cannot connect to its metrics"


def _reaches(rules: Sequence[Manifest], host: str, port: int | None) -> bool:
    """Whether egress rules admit SERVICE.NAMESPACE.svc at that port."""
    wanted = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": host.split(".")[1]}}}
    return any(wanted in rule.get("to", []) and {"port": port} in rule.get("ports", []) for rule in rules)


def _is_admitted(manifests: Sequence[Manifest], pod: Pod, port: str, namespace: Mapping[str, str]) -> bool:
    return any(
        _has_port(rule, pod.ports[port])
        for policy in _policies(manifests, pod, "Ingress")
        for rule in policy["spec"].get("ingress", [])
        if any(peer.get("namespaceSelector", {}).get("matchLabels") == namespace for peer in rule.get("from", []))
    )


def _is_needed(source: Pod, target: Pod, port: str) -> bool:
    if target.container["name"] == "redis":
        return bool(source.service)
    if source.labels == target.labels and any("nnodes" in each for each in source.container.get("args", [])):
        return True  # ranks of a worker group
    return source.service == "coordinator" and target.service not in ("coordinator", "") and port == "grpc"


def _admits(manifests: Sequence[Manifest], source: Pod, target: Pod, port: int) -> bool:
    into = [
        rule
        for policy in _policies(manifests, target, "Ingress")
        for rule in policy["spec"].get("ingress", [])
        if (not rule.get("from") or _is_peer(rule["from"], source.labels)) and _has_port(rule, port)
    ]
    out = [
        rule
        for policy in _policies(manifests, source, "Egress")
        for rule in policy["spec"].get("egress", [])
        if _is_peer(rule.get("to", []), target.labels) and _has_port(rule, port)
    ]
    return bool(into and out)


def _has_port(rule: Manifest, port: int) -> bool:
    return "ports" not in rule or port in [each["port"] for each in rule["ports"]]


def _is_peer(peers: Sequence[Manifest], labels: Mapping[str, str]) -> bool:
    """Whether the peers include a pod of the fleet's namespace with these labels."""
    own = [peer["podSelector"] for peer in peers if "podSelector" in peer and "namespaceSelector" not in peer]
    return any(matches(selector, labels) for selector in own)


def _policies(manifests: Sequence[Manifest], pod: Pod, direction: str) -> list[Manifest]:
    return [
        policy
        for policy in of_kind(manifests, "NetworkPolicy")
        if direction in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], pod.labels)
    ]


def _selected(manifests: Sequence[Manifest], policy: Manifest) -> list[Pod]:
    return [pod for pod in pods(manifests) if matches(policy["spec"]["podSelector"], pod.labels)]
