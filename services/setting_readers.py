"""The services that read each setting, for error messages about a setting of another service.

It is a table of names, so that services do not import each other's settings. A test compares it with the classes.
"""

from __future__ import annotations

from collections.abc import Mapping

_COORDINATOR = ("coordinator",)
_WORKERS = ("text_encoding", "image_encoding", "latent_preparation", "before_denoising", "denoising", "decoding")

_NAMES: Mapping[tuple[str, ...], str] = {
    _COORDINATOR: (
        "store_replicas max_store_memory max_open_requests max_open_of_caller queue_limit worker_wait_seconds "
        "queue_seconds record_seconds result_seconds tls_client_ca tls_public_cert tls_public_key tls_worker_name "
        "api_keys jwt_keys jwt_secret jwt_audience jwt_issuer jwt_caller_claim jwt_leeway_seconds max_calls "
        "max_streams max_connections max_message_bytes max_artifact_bytes max_raw_result_bytes max_result_bytes "
        "heartbeat_seconds heartbeat_ttl_seconds scaler_listen assumed_seconds log_prompts"
    ),
    ("coordinator", "before_denoising", "denoising", "decoding"): "step_seconds",
    _WORKERS: "advertise device dtype threads capacity announce_seconds idle_seconds max_call_bytes tls_callers",
    ("text_encoding",): "reply_cache_bytes reply_cache_redis_bytes reply_cache_redis_seconds reply_cache_redis_gain",
    ("image_encoding", "denoising", "decoding"): "kernels kernel_cache",
    ("before_denoising", "denoising", "decoding"): "hang_seconds hang_mean_steps hang_exit_seconds",
    ("before_denoising", "denoising"): "warm_up",
    ("decoding",): "sessions",
    ("denoising",): (
        "attention_backend step_checkpoint_every step_checkpoint_seconds step_memory_bytes linear_dtype "
        "step_cache_threshold swap_experts tp ulysses ring cfg nnodes node_rank rdzv_endpoint "
        "max_restarts rank_heartbeat_seconds rank_lost_seconds rank_join_seconds"
    ),
}

READERS: Mapping[str, tuple[str, ...]] = {
    name: services for services, names in _NAMES.items() for name in names.split()
}
"""Services by setting, in pipeline order. Settings that all services read are not listed."""
