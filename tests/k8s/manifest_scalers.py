"""Checks of autoscalers: their targets, stages, models, and the metrics in their queries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from manifests import SERVICES, Manifest, find, matches, name_of, of_kind, pods
from promql import errors_of

from models.catalog import open_model, shipped_models
from models.registry import load_registry
from services.coordinator.scaler import _METRICS

_SCALERS = ("ScaledObject", "HorizontalPodAutoscaler")
_EXTERNAL = ("external", "external-push")


def scale_targets(manifests: Sequence[Manifest]) -> Iterator[str]:
    """The target of each scaler exists and runs the stage whose load scales it."""
    for scaler in of_kind(manifests, *_SCALERS):
        stage = _target_stage(manifests, scaler)
        if stage is None:
            yield f"{name_of(scaler)}: its target {_target(scaler)} does not exist"
        for asked in _asked_stages(scaler):
            if stage is not None and asked != stage:
                yield f"{name_of(scaler)}: scales by the load of {asked}, but its target runs {stage}"


def _target(scaler: Manifest) -> tuple[str, str]:
    reference = scaler["spec"]["scaleTargetRef"]
    return reference.get("kind", "Deployment"), reference["name"]


def _target_stage(manifests: Sequence[Manifest], scaler: Manifest) -> str | None:
    """Service of the scaled pods; None if the target does not exist."""
    kind, name = _target(scaler)
    if kind == "DisaggregatedSetRoleScaler":
        owners = {
            f"{name_of(each)}/{role['name']} worker"
            for each in of_kind(manifests, "DisaggregatedSet")
            for role in each["spec"]["roles"]
            if f"{each['metadata']['name']}-{role['name']}" == name
            and role.get("scaling", {}).get("mode") == "External"
        }
    else:
        owners = {f"{kind}/{name}", f"{kind}/{name} leader"}
    return next((pod.service for pod in pods(manifests) if pod.owner in owners), None)


def _asked_stages(scaler: Manifest) -> list[str]:
    """Stages whose load scales the target: in triggers, queries and external metrics of an HPA."""
    spec = scaler["spec"]
    triggers_ = [each["metadata"] for each in spec.get("triggers", [])]
    selectors = [each["external"]["metric"]["selector"]["matchLabels"] for each in spec.get("metrics", [])]
    queries = re.findall(r'service="(\w+)"', " ".join(each.get("query", "") for each in triggers_))
    return [each["stage"] for each in triggers_ if "stage" in each] + queries + [each["service"] for each in selectors]


def scaled_once(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Targets have one scaler (HPA or ScaledObject) and no replicas; KEDA's limits are consistent."""
    targets = [_target(scaler) for scaler in of_kind(manifests, *_SCALERS)]
    for kind, name in sorted(set(targets)):
        if targets.count((kind, name)) > 1:
            yield f"{kind}/{name}: has {targets.count((kind, name))} scalers"
        target = find(manifests, kind, name)
        if target is not None and "replicas" in target["spec"]:
            yield f"{kind}/{name}: has replicas, which its scaler sets"
    for each in of_kind(manifests, "Deployment"):
        if "replicas" not in each["spec"] and ("Deployment", each["metadata"]["name"]) not in targets:
            yield f"{name_of(each)}: has neither replicas nor a scaler"
    for each in of_kind(manifests, "HorizontalPodAutoscaler"):
        if each["spec"].get("minReplicas", 1) < 1:
            yield f"{name_of(each)}: minReplicas is not at least 1, which an HPA needs without an alpha feature"
    for each in of_kind(manifests, "ScaledObject"):
        spec = each["spec"]
        if "idleReplicaCount" in spec and not spec["idleReplicaCount"] < spec.get("minReplicaCount", 0):
            yield f"{name_of(each)}: idleReplicaCount is not less than minReplicaCount, which KEDA refuses"


def triggers(manifests: Sequence[Manifest]) -> Iterator[str]:
    """A trigger connects to the coordinator's scaler and names a served model and stage."""
    for scaler in of_kind(manifests, "ScaledObject"):
        for trigger in [each for each in scaler["spec"]["triggers"] if each["type"] in _EXTERNAL]:
            for error in _trigger_errors(manifests, trigger, trigger["metadata"]):
                yield f"{name_of(scaler)}: {error}"
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            asked = metric["external"]["metric"]["selector"]["matchLabels"]
            yield from (f"{name_of(scaler)}: {each}" for each in _unserved(manifests, asked["model"], asked["service"]))


def formulas(manifests: Sequence[Manifest]) -> Iterator[str]:
    """A scalingModifiers formula reads named triggers, and its target equals their targetSeconds."""
    for scaler in of_kind(manifests, "ScaledObject"):
        modifiers = scaler["spec"].get("advanced", {}).get("scalingModifiers")
        if modifiers is None:
            continue
        asked = {each["name"]: each["metadata"] for each in scaler["spec"]["triggers"] if "name" in each}
        read = sorted(set(re.findall(r"\b[a-z_]\w*", modifiers["formula"])))
        if unknown := [name for name in read if name not in asked]:
            yield f"{name_of(scaler)}: its formula reads {', '.join(unknown)}, but triggers are named {sorted(asked)}"
        for name in read:
            seconds = asked.get(name, {}).get("targetSeconds", modifiers["target"])
            if seconds != modifiers["target"]:
                yield f"{name_of(scaler)}: its target is {modifiers['target']}, targetSeconds of {name} is {seconds}"


def _trigger_errors(manifests: Sequence[Manifest], trigger: Manifest, asked: Mapping[str, str]) -> Iterator[str]:
    if lacking := {"scalerAddress", "model", "stage", "targetSeconds"} - asked.keys():
        yield f"scaler metadata lacks {sorted(lacking)}"
        return
    host, _, port = asked["scalerAddress"].rpartition(":")
    service = find(manifests, "Service", host.partition(".")[0])
    if service is None or host != f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc":
        yield f"{asked['scalerAddress']} is not NAME.NAMESPACE.svc of a Service"
    elif not _is_served(manifests, service, int(port)):
        yield f"{asked['scalerAddress']} is not the scaler port of the coordinators"
    if not float(asked["targetSeconds"]) > 0:
        yield f"targetSeconds {asked['targetSeconds']} is not greater than 0"
    if asked.get("metricName", "wanted_seconds") not in _METRICS:
        yield f"metricName {asked['metricName']} is not one of {sorted(_METRICS)}"
    yield from _unserved(manifests, asked["model"], asked["stage"])
    authentication = trigger.get("authenticationRef", {}).get("name")
    if authentication and find(manifests, "TriggerAuthentication", authentication) is None:
        yield f"TriggerAuthentication {authentication} does not exist"


def _is_served(manifests: Sequence[Manifest], service: Manifest, port: int) -> bool:
    target = next((each["targetPort"] for each in service["spec"]["ports"] if each["port"] == port), None)
    chosen = [pod for pod in pods(manifests) if matches({"matchLabels": service["spec"]["selector"]}, pod.labels)]
    listens = [
        each["value"].rpartition(":")[2]
        for pod in chosen
        for each in pod.container["env"]
        if each["name"] == "FLEET_SCALER_LISTEN"
    ]
    return bool(chosen) and all(listens == [str(pod.ports.get(str(target)))] for pod in chosen)


def _unserved(manifests: Sequence[Manifest], model: str, stage: str) -> Iterator[str]:
    """Errors for a model that is not served, and for a stage that a shipped model does not have."""
    served: dict[str, str] = {}
    for each in of_kind(manifests, "ConfigMap"):
        for reference in str(each["data"].get("FLEET_MODEL", "")).split(","):
            served[reference.partition("=")[0]] = reference
    if model not in served:
        yield f"model {model} is not served; served models are {sorted(filter(None, served))}"
    elif served[model] in shipped_models():
        known = [spec.service for spec in open_model(model, load_registry()).services]
        if stage not in known:
            yield f"model {model} has no stage {stage}; it has {known}"
    if stage not in SERVICES - {"coordinator"}:
        yield f"{stage} is not a stage; stages are {sorted(SERVICES - {'coordinator'})}"


def metric_names(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Metrics in rules, queries and HPAs are exported by the fleet's processes, with the used labels."""
    recorded = {
        rule["record"]: rule
        for each in of_kind(manifests, "PrometheusRule")
        for group in each["spec"]["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    for each in of_kind(manifests, "PrometheusRule", *_SCALERS):
        for expression in _expressions(each):
            yield from (f"{name_of(each)}: {error}" for error in errors_of(expression, recorded))


def _expressions(manifest: Manifest) -> Iterator[str]:
    """PromQL of rules and queries, and selectors of an HPA's external metrics."""
    spec = manifest["spec"]
    yield from (rule["expr"] for group in spec.get("groups", []) for rule in group["rules"])
    yield from (each["metadata"]["query"] for each in spec.get("triggers", []) if "query" in each["metadata"])
    for metric in [each["external"]["metric"] for each in spec.get("metrics", [])]:
        matchers = [f'{label}="{value}"' for label, value in metric["selector"]["matchLabels"].items()]
        yield f"{metric['name']}{{{', '.join(matchers)}}}"
