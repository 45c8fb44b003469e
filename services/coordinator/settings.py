"""Settings of the coordinator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.rpc.options import ServerLimits
from common.rpc.tls import TlsSettings
from common.settings import SettingsError, setting
from common.state.presence import HEARTBEAT_SECONDS, TTL_SECONDS
from common.state.requests import AdmissionLimits, Retention
from common.state.store_server import DEFAULT_MEMORY_FRACTION, StoreSettings
from models.catalog import DEFAULT_MODEL

_MOST_LEEWAY_SECONDS = 300.0

_POSITIVE = (
    "max_open_requests",
    "max_open_of_caller",
    "queue_limit",
    "max_calls",
    "max_streams",
    "max_connections",
    "record_seconds",
    "result_seconds",
    "assumed_seconds",
)


@dataclass(frozen=True, kw_only=True)
class CoordinatorSettings(StoreSettings, TlsSettings):
    """Serve the public API: accept requests, and run the stages of their models on workers."""

    model: tuple[str, ...] = setting((DEFAULT_MODEL,), help="model to serve: NAME, DIR or NAME=DIR; repeatable")
    listen: str = setting("127.0.0.1:50051", help="host:port or unix:path to listen on; port 0: any free port")
    redis: str = setting("redis://127.0.0.1:6379/0", help="URL of the request store")
    store_replicas: int = setting(
        0, help="replicas of the store that must acknowledge the admission and the end of a request"
    )
    max_store_memory: float = setting(
        DEFAULT_MEMORY_FRACTION, help="fraction of the store's maxmemory above which new requests are refused"
    )
    plugins: tuple[Path, ...] = setting((), help="directory with model families from outside this tree; repeatable")
    grace_seconds: float = setting(30.0, help="seconds for running requests to finish after SIGTERM")
    max_open_requests: int = setting(1_000, help="maximum open requests of a model")
    max_open_of_caller: int = setting(1_000, help="maximum open requests of a caller without max_open in api_keys")
    queue_limit: int = setting(256, help="waiting claims of a service of a model at which requests are refused")
    worker_wait_seconds: float | None = setting(
        None, help="seconds without a reachable worker after which a request fails; unset: requests wait"
    )
    queue_seconds: float = setting(
        0.0, help="maximum estimated waiting time of an accepted request, in seconds; 0: no maximum"
    )
    record_seconds: float = setting(86_400.0, help="seconds for which the record of an ended request is stored")
    result_seconds: float = setting(3_600.0, help="seconds for which result files are stored; at most record_seconds")
    tls_client_ca: Path | None = setting(
        None, help="certificate authority of clients; unset: clients need no certificate"
    )
    tls_public_cert: Path | None = setting(None, help="server certificate for clients; unset: tls_cert")
    tls_public_key: Path | None = setting(None, help="private key of tls_public_cert")
    tls_worker_name: str = setting("worker", help="name that worker certificates must have")
    api_keys: Path | None = setting(None, help="TOML file with callers and key digests; reread when it changes")
    jwt_keys: Path | None = setting(
        None, help="JWK Set or PEM file with the public keys that verify tokens; reread when it changes"
    )
    jwt_secret: Path | None = setting(None, help="file with the secret for HS256 tokens; reread when it changes")
    jwt_audience: str = setting("", help="required audience of a token (aud)")
    jwt_issuer: str = setting("", help="required issuer of a token (iss)")
    jwt_caller_claim: str = setting("sub", help="claim of a token with the caller's name")
    jwt_leeway_seconds: float = setting(30.0, help="tolerated clock skew of a token in seconds, at most 300")
    max_calls: int = setting(4_096, help="maximum concurrent RPCs")
    max_streams: int = setting(1_024, help="maximum concurrent RPCs per connection; further RPCs wait")
    max_connections: int = setting(1_024, help="maximum open connections; further connections are closed")
    max_message_bytes: int = setting(48 << 20, help="maximum size of a request message in bytes, with its images")
    max_artifact_bytes: int = setting(4 << 30, help="memory for artifacts between stages, of all requests, in bytes")
    max_raw_result_bytes: int = setting(1 << 30, help="maximum size of a .safetensors result in bytes")
    max_result_bytes: int = setting(1 << 30, help="maximum size of a streamed video in the request store, in bytes")
    step_seconds: float = setting(0.25, help="minimum seconds between two events with the steps of a request")
    heartbeat_seconds: float = setting(HEARTBEAT_SECONDS, help="seconds between two heartbeats in the request store")
    heartbeat_ttl_seconds: float = setting(TTL_SECONDS, help="seconds without a heartbeat until a coordinator is lost")
    scaler_listen: str = setting("", help="host:port or unix:path of KEDA's external scaler; empty: no scaler")
    assumed_seconds: float = setting(
        10.0, help="assumed compute seconds of a request at a stage without a measurement, for autoscaling"
    )
    metrics_port: int | None = setting(None, help="port for Prometheus metrics; unset: no metrics")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting("INFO", help="minimum level of log lines")
    log_format: Literal["text", "json"] = setting(
        "text", help="format of log lines: text, or json with one object per line"
    )
    log_prompts: bool = setting(False, help="log the prompts of each accepted request")

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not vars(self)[name] > 0:
                raise SettingsError(f"{name}: {vars(self)[name]} is not more than 0; 1 works", field=name)
        if self.store_replicas < 0:
            raise SettingsError(
                f"store_replicas: {self.store_replicas} is not at least 0; 0 works", field="store_replicas"
            )
        if not 0 < self.max_store_memory <= 1:
            raise SettingsError(
                f"max_store_memory: {self.max_store_memory:g} is not more than 0 and at most 1; 0.9 works",
                field="max_store_memory",
            )
        if self.grace_seconds < 0:
            raise SettingsError(
                f"grace_seconds: {self.grace_seconds} is not at least 0; 30 works", field="grace_seconds"
            )
        if self.result_seconds > self.record_seconds:
            raise SettingsError(
                f"result_seconds: {self.result_seconds:g} is not at most record_seconds ({self.record_seconds:g})",
                field="result_seconds",
            )
        self._check_token_rules()
        if not 0 < self.heartbeat_seconds < self.heartbeat_ttl_seconds:
            raise SettingsError(
                f"heartbeat_seconds: {self.heartbeat_seconds:g} is not above 0 and below heartbeat_ttl_seconds "
                f"({self.heartbeat_ttl_seconds:g})",
                field="heartbeat_seconds",
            )

    def _check_token_rules(self) -> None:
        given = [name for name in ("jwt_keys", "jwt_secret") if vars(self)[name] is not None]
        named = [name for name in ("jwt_audience", "jwt_issuer") if vars(self)[name]]
        if given and (lacking := {"jwt_audience", "jwt_issuer"}.difference(named)):
            field = min(lacking)
            raise SettingsError(f"{given[0]} is set without {field}, which every token needs; set both", field=field)
        if named and not given:
            raise SettingsError(
                f"{named[0]} is set without jwt_keys or jwt_secret, which verify tokens; set one", field="jwt_keys"
            )
        if not self.jwt_caller_claim:
            raise SettingsError("jwt_caller_claim is empty; sub works", field="jwt_caller_claim")
        if not 0 <= self.jwt_leeway_seconds <= _MOST_LEEWAY_SECONDS:
            raise SettingsError(
                f"jwt_leeway_seconds: {self.jwt_leeway_seconds:g} is not from 0 to {_MOST_LEEWAY_SECONDS:g}; 30 works",
                field="jwt_leeway_seconds",
            )

    @property
    def retention(self) -> Retention:
        """Retention of ended requests and of their results."""
        return Retention(self.record_seconds, self.result_seconds)

    @property
    def server_limits(self) -> ServerLimits:
        """Limits of the public port."""
        return ServerLimits(
            message_bytes=self.max_message_bytes,
            streams=self.max_streams,
            calls=self.max_calls,
            connections=self.max_connections,
        )

    def limits(self, services: tuple[str, ...], max_open_of_caller: int | None = None) -> AdmissionLimits:
        """Admission limits of a caller, for a model with these services.

        If `max_open_of_caller` is None, the setting of this name applies.
        """
        theirs = self.max_open_of_caller if max_open_of_caller is None else max_open_of_caller
        return AdmissionLimits(services, self.max_open_requests, self.queue_limit, theirs, self.queue_seconds)
