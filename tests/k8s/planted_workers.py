"""Further planted errors: in pods, and in connections to and from other namespaces."""

from __future__ import annotations

from planted import CONTAINER, LEADER, POD, Planted, drop, edit, set_shared

_D, _NP, _PDB = "Deployment", "NetworkPolicy", "PodDisruptionBudget"
_LABEL = "app.kubernetes.io/name"
_OTHER = {"matchLabels": {_LABEL: "denoising"}}
_REDIS = {"name": "FLEET_REDIS", "valueFrom": {"secretKeyRef": {"name": "fleet-redis", "key": "uri"}}}
_INIT = f"{POD}/initContainers/0"

PLANTED_IN_WORKERS = [
    Planted("selectors", "dev", "another service", edit(_PDB, "decoding", "spec/selector", _OTHER)),
    Planted("selectors", "dev", "another service", edit("Service", "decoding", "spec/selector", _OTHER["matchLabels"])),
    Planted("kinds", "dev", "runs as", edit(_D, "decoding", f"{POD}/serviceAccountName", "denoising")),
    Planted("balancing", "dev", "decoding: has no headless", drop("Service", "decoding", "spec/clusterIP")),
    Planted("balancing", "dev", "coordinator: has no headless", drop("Service", "coordinators")),
    Planted("balancing", "dev", "kubernetes.io/h2c", drop("Service", "coordinator", "spec/ports/0/appProtocol")),
    Planted(
        "balancing",
        "production",
        "not https",
        edit("Service", "coordinator", "spec/ports/0/appProtocol", "kubernetes.io/h2c"),
    ),
    Planted("disruptions", "dev", "decoding: maxUnavailable", edit(_PDB, "decoding", "spec/maxUnavailable", 0)),
    Planted("disruptions", "dev", "decoding: maxUnavailable", edit(_PDB, "decoding", "spec/minAvailable", 2)),
    Planted("start_up", "dev", "less than 1800", edit(_D, "denoising", f"{CONTAINER}/startupProbe/periodSeconds", 1)),
    Planted("start_up", "dev", "less than 60", edit(_D, "coordinator", f"{CONTAINER}/startupProbe/periodSeconds", 0)),
    Planted("images", "gpu", "of check-weights", edit(_D, "decoding", f"{_INIT}/image", "diffusion-fleet:check")),
    Planted(
        "secret_keys",
        "dev",
        "Secret fleet-redis has no uri",
        edit(_D, "denoising", f"{CONTAINER}/env/0/valueFrom/secretKeyRef/key", "uri"),
    ),
    Planted(
        "secret_keys",
        "production",
        "Secret fleet-redis has no uri",
        edit(_D, "denoising", f"{CONTAINER}/env", [_REDIS]),
    ),
    Planted(
        "secret_keys", "production", "has no server.crt", set_shared("FLEET_TLS_CERT", "/etc/fleet/tls/server.crt")
    ),
    Planted(
        "secret_keys",
        "production",
        "not fleet-tls-stage",
        edit(_D, "decoding", f"{POD}/volumes/0/secret/secretName", "fleet-tls-coordinator"),
    ),
    Planted(
        "secret_keys",
        "production",
        "has no ca.pem",
        edit("TriggerAuthentication", "fleet-scaler", "spec/secretTargetRef/0/key", "ca.pem"),
    ),
    Planted(
        "secret_keys",
        "production",
        "not a parameter",
        edit("TriggerAuthentication", "fleet-scaler", "spec/secretTargetRef/0/parameter", "ca"),
    ),
    Planted("weights", "gpu", "no init container", drop(_D, "decoding", f"{POD}/initContainers")),
    Planted("weights", "gpu", "no init container", edit(_D, "decoding", f"{_INIT}/command", ["sh", "/etc/check/a.sh"])),
    Planted("weights", "gpu", "fleet does not mount", edit(_D, "decoding", f"{CONTAINER}/volumeMounts", [])),
    Planted("weights", "gpu", "check-weights mounts", drop(_D, "decoding", f"{_INIT}/volumeMounts/0/readOnly")),
    Planted("devices", "gpu", "cuda with 0 GPUs", drop(_D, "decoding", f"{CONTAINER}/resources/limits/nvidia.com~gpu")),
    Planted(
        "devices",
        "gpu",
        "cpu with 1 GPUs",
        edit(_D, "decoding", f"{CONTAINER}/env", [{"name": "FLEET_DEVICE", "value": "cpu"}]),
    ),
    Planted(
        "devices",
        "gpu-group",
        "8 ranks do not fit 1 nodes",
        edit(_D, "denoising", f"{CONTAINER}/args", ["denoising", "--tp=4", "--ulysses", "2"]),
    ),
    Planted(
        "devices",
        "multi-node",
        "16 ranks do not fit 3 nodes",
        edit("LeaderWorkerSet", "denoising", "spec/leaderWorkerTemplate/size", 3),
    ),
    Planted(
        "devices",
        "multi-node",
        "leader: 16 ranks do not fit 2 nodes with 4 GPUs",
        edit("LeaderWorkerSet", "denoising", f"{LEADER}/containers/0/resources/limits/nvidia.com~gpu", 4),
    ),
    Planted("scaled_once", "hpa", "minReplicas", edit("HorizontalPodAutoscaler", "decoding", "spec/minReplicas", 0)),
    Planted(
        "triggers",
        "keda",
        "lacks ['targetSeconds']",
        drop("ScaledObject", "decoding", "spec/triggers/0/metadata/targetSeconds"),
    ),
    Planted(
        "metric_names",
        "production",
        "begun of fleet_lost_calls_total is never true",
        edit("PrometheusRule", "fleet", "spec/groups/0/rules/1/expr", 'fleet_lost_calls_total{begun="true"}'),
    ),
    Planted(
        "metric_names",
        "hpa",
        "fleet_queued_seconds has no label stage",
        edit(
            "HorizontalPodAutoscaler",
            "decoding",
            "spec/metrics/0/external/metric/selector/matchLabels/stage",
            "decoding",
        ),
    ),
    Planted("outside_flows", "dev", "decoding: cannot connect to DNS", drop(_NP, "decoding", "spec/egress/1")),
    Planted(
        "outside_flows", "dev", "coordinator: cannot connect to DNS", drop(_NP, "coordinator", "spec/egress/2/ports/0")
    ),
    Planted(
        "outside_flows",
        "dev",
        "decoding: cannot connect to DNS",
        edit(_NP, "decoding", "spec/egress/1/to/0/podSelector", {"matchLabels": {"k8s-app": "dns"}}),
    ),
    Planted(
        "outside_flows", "production", "decoding: cannot connect to a Redis", drop(_NP, "decoding", "spec/egress/0")
    ),
    Planted("outside_flows", "keda", "KEDA cannot connect", drop(_NP, "coordinator-scaler")),
    Planted("outside_flows", "production", "Prometheus cannot connect", drop(_NP, "metrics")),
    Planted("outside_flows", "production", "decoding: cannot connect to the collector", drop(_NP, "traces")),
    Planted(
        "outside_flows",
        "production",
        "coordinator: cannot connect to the collector otel-collector.observability.svc:4318",
        set_shared("OTEL_EXPORTER_OTLP_ENDPOINT", "http://otel-collector.observability.svc:4318"),
    ),
    Planted("settings", "production", "OTEL_EXPORTER_ENDPOINT is not read", set_shared("OTEL_EXPORTER_ENDPOINT", "x")),
    Planted(
        "outside_flows",
        "keda",
        "KEDA cannot connect",
        edit(_NP, "coordinator-scaler", "spec/ingress/0/ports/0/port", 50051),
    ),
]
