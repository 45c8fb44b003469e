"""All Prometheus metrics of the fleet: names, labels and buckets. No other module defines metrics.

A name ends with the unit, if the metric has a unit: seconds, bytes, or a ratio from 0 to 1. prometheus_client appends
`total` to the names of counters. Names of RPC metrics follow gRFC A66. LABELS states the rule that bounds the values of
each label. `poe metrics` generates the table of all metrics in services/README.md from this module.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, Summary

from common.trace_context import current_trace_id

LABELS = {
    "service": "services of the fleet",
    "model": "model names in the setting `model` of the coordinators",
    "stage": "class names of stages",
    "state": "terminal states of requests",
    "result": "hit, miss, failed (cache lookups); stored, failed (saves); ok, error, cancelled (store operations)",
    "begun": "yes, no",
    "reason": "lost, handed_over, full",
    "cause": "left: the owner shut down; lost: its heartbeat expired; own: this coordinator already owned the request",
    "kind": "kinds of damage that the script of the request store counts",
    "work": "upper bounds of the pixels of a step, over outputs and guidance branches: 65536, 262144, 1048576, "
    "4194304, 16777216, 67108864, 268435456, 1073741824; `more` above; `unknown` if the caller sends no number",
    "operation": "operations of the script of the request store, and Redis commands of the fleet",
    "device": "indices of the GPUs that are visible to the process",
    "grpc_method": "methods of the fleet's services",
    "grpc_status": "names of gRPC status codes",
}
"""For each label, the rule that bounds the number of its values."""

NOTES = (
    "gRFC A66's `grpc.client.call.duration` is omitted: coordinators set no gRPC retry policy, so that a call has one "
    "attempt and the same duration. `fleet_service_duration_seconds` includes all calls of a request at a service.",
)
"""Notes for readers of the generated table."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Buckets for durations from milliseconds to minutes."""
_STORE_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
# Bucket bounds of gRFC A66.
_RPC_SECONDS = (
    *(0, 0.00001, 0.00005, 0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01),
    *(0.013, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8),
    *(1, 2, 5, 10, 20, 50, 100),
)
_RPC_BYTES = (0, *(1 << power for power in (10, 11, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32)))
_WORK = tuple(4**power for power in range(8, 16))

# RPCs.
SERVER_CALLS_STARTED = Counter("grpc_server_call_started", "Calls received by a server", ("grpc_method",))
SERVER_CALL_SECONDS = Histogram(
    "grpc_server_call_duration_seconds",
    "Duration of a call at its server",
    ("grpc_method", "grpc_status"),
    buckets=_RPC_SECONDS,
)
SERVER_RECEIVED_BYTES = Histogram(
    "grpc_server_call_rcvd_total_compressed_message_size_bytes",
    "Size of the messages that a server has received in a call; the fleet does not compress messages",
    ("grpc_method", "grpc_status"),
    buckets=_RPC_BYTES,
)
SERVER_SENT_BYTES = Histogram(
    "grpc_server_call_sent_total_compressed_message_size_bytes",
    "Size of the messages that a server has sent in a call; the fleet does not compress messages",
    ("grpc_method", "grpc_status"),
    buckets=_RPC_BYTES,
)
CLIENT_ATTEMPTS_STARTED = Counter("grpc_client_attempt_started", "Calls of coordinators to workers", ("grpc_method",))
CLIENT_ATTEMPT_SECONDS = Histogram(
    "grpc_client_attempt_duration_seconds",
    "Duration of a coordinator's call to a worker, for all statuses",
    ("grpc_method", "grpc_status"),
    buckets=_RPC_SECONDS,
)
CLIENT_SENT_BYTES = Histogram(
    "grpc_client_attempt_sent_total_compressed_message_size_bytes",
    "Size of the messages that a coordinator has sent in a call; the fleet does not compress messages",
    ("grpc_method", "grpc_status"),
    buckets=_RPC_BYTES,
)
CLIENT_RECEIVED_BYTES = Histogram(
    "grpc_client_attempt_rcvd_total_compressed_message_size_bytes",
    "Size of the messages that a coordinator has received in a call; the fleet does not compress messages",
    ("grpc_method", "grpc_status"),
    buckets=_RPC_BYTES,
)
RPC_IN_FLIGHT = Gauge("fleet_rpc_in_flight", "Calls in flight at a server", ("grpc_method",))

# Requests, in coordinators.
REQUESTS = Counter("fleet_requests", "Requests that reached their terminal state", ("model", "state"))
REQUEST_SECONDS = Histogram(
    "fleet_request_duration_seconds",
    "Time from a request's admission, or its take-over by this coordinator, to its terminal state",
    ("model", "state"),
    buckets=SECONDS,
)
OPEN_REQUESTS = Gauge(
    "fleet_open_requests", "Requests that have not ended and still need the service", ("service", "model")
)
TAKEN_OVER_REQUESTS = Counter(
    "fleet_taken_over_requests",
    "Requests that this coordinator took over, by the cause of the take-over",
    ("model", "cause"),
)
RESUMED_CALLS = Counter("fleet_resumed_calls", "Calls that resumed from a step checkpoint", ("service", "model"))
STEPS_SAVED = Counter(
    "fleet_steps_saved", "Denoising steps not executed because their request was cancelled or expired", ("model",)
)

# Services of a model, in coordinators.
QUEUE_LENGTH = Gauge("fleet_queue_length", "Requests that wait for a worker", ("service", "model"))
QUEUED_SECONDS = Gauge(
    "fleet_queued_seconds", "Outstanding work in compute seconds: remaining steps times pace", ("service", "model")
)
QUEUE_WAIT_SECONDS = Histogram(
    "fleet_queue_wait_seconds", "Time for which a call waited for a worker", ("service", "model"), buckets=SECONDS
)
SERVICE_SECONDS = Histogram(
    "fleet_service_duration_seconds",
    "Duration of a request at a service: queue, transport, computing, and all attempts",
    ("service", "model"),
    buckets=SECONDS,
)
RETRIES = Counter(
    "fleet_retried_calls",
    "Calls that were retried because the worker was lost, handed the call over, or was at capacity",
    ("service", "model", "reason"),
)
LOST_CALLS = Counter(
    "fleet_lost_calls",
    "Calls that were lost with their worker, by whether their stages had started",
    ("service", "model", "begun"),
)
HANDED_OVER_CALLS = Counter(
    "fleet_handed_over_calls", "Calls that a draining worker has handed over", ("service", "model")
)
STEP_CHECKPOINTS_RECEIVED = Counter(
    "fleet_step_checkpoints", "Step checkpoints received from workers", ("service", "model")
)
STEP_CHECKPOINT_BYTES = Counter(
    "fleet_step_checkpoint_bytes",
    "Size of the step checkpoints received from workers",
    ("service", "model"),
)
STEP_CHECKPOINT_SAVES = Counter(
    "fleet_step_checkpoint_saves", "Writes of step checkpoints to the request store, by result", ("result",)
)
WORKERS_LIVE = Gauge("fleet_workers_live", "Workers with a valid heartbeat that can run requests", ("service", "model"))
WORKERS_INCOMPATIBLE = Gauge(
    "fleet_workers_incompatible",
    "Workers with a valid heartbeat whose contract is incompatible with this coordinator",
    ("service", "model"),
)
WORKERS_HELD = Gauge("fleet_workers_held", "Workers that run a request", ("service", "model"))
WORKERS_DEAD = Gauge(
    "fleet_workers_dead",
    "Workers that were lost in the last 10 minutes and have not registered again",
    ("service", "model"),
)
SUSPECTED_WORKERS = Counter(
    "fleet_suspected_workers",
    "Exclusions of a worker from grants to this coordinator, each after the loss of a call",
    ("service", "model"),
)
ARTIFACT_BYTES = Gauge("fleet_artifact_bytes", "Size of the artifacts of running requests in this coordinator's memory")

# Stages, in workers.
STAGE_SECONDS = Histogram(
    "fleet_stage_seconds", "Compute time of a stage", ("service", "model", "stage"), buckets=SECONDS
)
STEP_SECONDS = Histogram(
    "fleet_step_seconds",
    "Time per step between two progress reports, by the pixels of a step over outputs and guidance branches",
    ("service", "model", "work"),
    buckets=SECONDS,
)
DEVICE_IDLE_SECONDS = Histogram(
    "fleet_device_idle_seconds",
    "Time for which the worker's device was idle between two calls",
    ("service", "model"),
    buckets=SECONDS,
)
DEVICE_BUSY_SECONDS = Counter(
    "fleet_device_busy_seconds", "Time in which the worker's device ran a call", ("service", "model")
)
CACHE_LOOKUPS = Counter(
    "fleet_reply_cache_lookups", "Lookups in the reply cache of a worker", ("service", "model", "result")
)
SHARED_CACHE_LOOKUPS = Counter(
    "fleet_shared_reply_cache_lookups", "Lookups in the shared reply cache in Redis", ("service", "model", "result")
)
CACHE_BYTES = Gauge("fleet_reply_cache_bytes", "Size of the cached replies of a worker", ("service", "model"))
STEPS_REUSED = Counter(
    "fleet_steps_reused", "Predictions of this rank that reused the cached contribution of all blocks but the first"
)
EXPERT_SWAP_SECONDS = Summary(
    "fleet_expert_swap_seconds", "Time to load the weights of another expert to this rank's device"
)

# GPUs of a worker.
GPU_MEMORY_USED_BYTES = Gauge("fleet_gpu_memory_used_bytes", "Used memory of a GPU, over all processes", ("device",))
GPU_MEMORY_TOTAL_BYTES = Gauge("fleet_gpu_memory_total_bytes", "Total memory of a GPU", ("device",))
GPU_UTILIZATION_RATIO = Gauge(
    "fleet_gpu_utilization_ratio", "Fraction of the last sample period in which a kernel ran on a GPU", ("device",)
)

# The request store.
STORE_SECONDS = Histogram(
    "fleet_store_operation_seconds",
    "Duration of an operation of the request store, including retries and blocking reads",
    ("operation", "result"),
    buckets=_STORE_SECONDS,
)
STORE_BYTES = Gauge("fleet_store_bytes", "Used memory of the request store")
STORE_LIMIT_BYTES = Gauge("fleet_store_limit_bytes", "Used memory at which Submit is refused; 0 for no limit")
STORE_REPAIRS = Gauge("fleet_store_repairs", "Damaged entries removed from the request store", ("kind",))


def work_label(tokens: int) -> str:
    """Return the value of the label `work` for a step. `tokens`: see StageWork; 0 if unknown."""
    if tokens <= 0:
        return "unknown"
    return next((str(bound) for bound in _WORK if tokens <= bound), "more")


def observe(histogram: Histogram, value: float) -> None:
    """Observe a value in a histogram, with the current trace id as exemplar if there is one."""
    trace_id = current_trace_id()
    histogram.observe(value, None if trace_id is None else {"trace_id": trace_id})
