"""What a coordinator runs with."""

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
    """Settings of the coordinator, which accepts requests and takes them through the stages of their models."""

    model: tuple[str, ...] = setting((DEFAULT_MODEL,), help="NAME, DIR or NAME=DIR to serve; repeatable")
    listen: str = setting("127.0.0.1:50051", help="host:port or unix:path to listen on; port 0 picks one")
    redis: str = setting("redis://127.0.0.1:6379/0", help="URL of the request store")
    store_replicas: int = setting(
        0, help="replicas of the store that must have a request, and its end, before it counts"
    )
    max_store_memory: float = setting(
        DEFAULT_MEMORY_FRACTION, help="fraction of the store's maxmemory from which on new requests are refused"
    )
    plugins: tuple[Path, ...] = setting((), help="directory with families that are not in this tree; repeatable")
    grace_seconds: float = setting(30.0, help="how long running requests may finish after SIGTERM")
    max_open_requests: int = setting(1_000, help="requests of a model that may be accepted and not ended")
    max_open_of_caller: int = setting(1_000, help="the same of one caller, unless api_keys tells another bound")
    queue_limit: int = setting(256, help="claims that may wait for one service of a model when a request is accepted")
    worker_wait_seconds: float | None = setting(
        None, help="fail a request that found no live worker, or reached none, for so long"
    )
    queue_seconds: float = setting(
        0.0, help="refuse what would have to wait longer, by the services' pace and the callers' parts; 0 refuses none"
    )
    record_seconds: float = setting(86_400.0, help="how long a request that has ended is remembered")
    result_seconds: float = setting(3_600.0, help="how long its files can be downloaded; at most record_seconds")
    tls_client_ca: Path | None = setting(
        None, help="authority whose certificates clients must show; unset asks for none"
    )
    tls_public_cert: Path | None = setting(None, help="certificate to show to clients, where it is not tls_cert")
    tls_public_key: Path | None = setting(None, help="private key of tls_public_cert")
    tls_worker_name: str = setting("worker", help="name in the certificates of workers")
    api_keys: Path | None = setting(None, help="TOML file of callers and their keys, read again when it changes")
    jwt_keys: Path | None = setting(
        None, help="JWK Set or PEM file of the public keys that sign callers' tokens, read again when it changes"
    )
    jwt_secret: Path | None = setting(None, help="file of the secret that signs tokens with HS256, if any does")
    jwt_audience: str = setting("", help="audience that a token must be for")
    jwt_issuer: str = setting("", help="issuer that a token must be of")
    jwt_caller_claim: str = setting("sub", help="claim of a token that names its caller")
    jwt_leeway_seconds: float = setting(30.0, help="how far a token's clock may be from this one, 300 at most")
    max_calls: int = setting(4_096, help="calls that are served at a time")
    max_streams: int = setting(1_024, help="calls that are served at a time on one connection; its others wait")
    max_connections: int = setting(1_024, help="connections that are open at a time; those beyond are closed")
    max_message_bytes: int = setting(48 << 20, help="largest request that is read, with its pictures")
    max_artifact_bytes: int = setting(4 << 30, help="memory for what stages hand on, over all requests")
    max_raw_result_bytes: int = setting(1 << 30, help="largest .safetensors result")
    max_result_bytes: int = setting(1 << 30, help="most bytes of a streamed video in the request store")
    step_seconds: float = setting(0.25, help="shortest time between two progress events of a request's steps")
    heartbeat_seconds: float = setting(HEARTBEAT_SECONDS, help="how often the store hears from this coordinator")
    heartbeat_ttl_seconds: float = setting(TTL_SECONDS, help="after which silence it counts as dead")
    scaler_listen: str = setting(
        "", help="host:port or unix:path on which KEDA's external scaler is served; empty serves none"
    )
    assumed_seconds: float = setting(
        10.0, help="compute seconds of a request at a stage where autoscaling has no measurement yet"
    )
    metrics_port: int | None = setting(None, help="port for Prometheus; unset serves no metrics")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting("INFO", help="least severe log lines to write")
    log_format: Literal["text", "json"] = setting(
        "text", help="format of log lines: text, or json with one object a line for collectors"
    )
    log_prompts: bool = setting(False, help="log the prompt and the negative prompt of each accepted request")

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not vars(self)[name] > 0:
                raise SettingsError(f"{name} must be more than 0, not {vars(self)[name]}", field=name)
        if self.store_replicas < 0:
            raise SettingsError(
                f"store_replicas: {self.store_replicas} is not 0 or more; 0 waits for none", field="store_replicas"
            )
        if not 0 < self.max_store_memory <= 1:
            raise SettingsError(
                f"max_store_memory must be more than 0 and at most 1, not {self.max_store_memory:g}",
                field="max_store_memory",
            )
        if self.grace_seconds < 0:
            raise SettingsError(
                f"grace_seconds must not be negative, but is {self.grace_seconds}", field="grace_seconds"
            )
        if self.result_seconds > self.record_seconds:
            raise SettingsError(
                f"result_seconds must be at most record_seconds ({self.record_seconds:g}), not {self.result_seconds:g}",
                field="result_seconds",
            )
        self._check_token_rules()
        if not 0 < self.heartbeat_seconds < self.heartbeat_ttl_seconds:
            raise SettingsError(
                "heartbeat_ttl_seconds must be longer than heartbeat_seconds", field="heartbeat_seconds"
            )

    def _check_token_rules(self) -> None:
        given = [name for name in ("jwt_keys", "jwt_secret") if vars(self)[name] is not None]
        named = [name for name in ("jwt_audience", "jwt_issuer") if vars(self)[name]]
        if given and (lacking := {"jwt_audience", "jwt_issuer"}.difference(named)):
            field = min(lacking)
            raise SettingsError(f"{given[0]} is set without {field}, which a token must name", field=field)
        if named and not given:
            raise SettingsError(f"{named[0]} is set without jwt_keys or jwt_secret to know tokens by", field="jwt_keys")
        if not self.jwt_caller_claim:
            raise SettingsError("jwt_caller_claim must not be empty; sub is usual", field="jwt_caller_claim")
        if not 0 <= self.jwt_leeway_seconds <= _MOST_LEEWAY_SECONDS:
            raise SettingsError(
                f"jwt_leeway_seconds must be from 0 to {_MOST_LEEWAY_SECONDS:g}, not {self.jwt_leeway_seconds:g}",
                field="jwt_leeway_seconds",
            )

    @property
    def retention(self) -> Retention:
        """How long what has ended is kept."""
        return Retention(self.record_seconds, self.result_seconds)

    @property
    def server_limits(self) -> ServerLimits:
        """What the public port takes on."""
        return ServerLimits(
            message_bytes=self.max_message_bytes,
            streams=self.max_streams,
            calls=self.max_calls,
            connections=self.max_connections,
        )

    def limits(self, services: tuple[str, ...], max_open_of_caller: int | None = None) -> AdmissionLimits:
        """What may be open and waiting for a model with these services, and for one caller."""
        theirs = self.max_open_of_caller if max_open_of_caller is None else max_open_of_caller
        return AdmissionLimits(services, self.max_open_requests, self.queue_limit, theirs, self.queue_seconds)
