"""What a coordinator runs with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.settings import SettingsError, setting
from common.state.presence import BEAT_SECONDS, TTL_SECONDS
from common.state.requests import Limits, Retention
from models.catalog import DEFAULT_MODEL


@dataclass(frozen=True, kw_only=True)
class CoordinatorSettings:
    """Settings of the coordinator, which accepts requests and takes them through the stages of their models."""

    model: tuple[str, ...] = setting((DEFAULT_MODEL,), help="NAME, DIR or NAME=DIR to serve; repeatable")
    listen: str = setting("127.0.0.1:50051", help="host:port or unix:path to listen on; port 0 picks one")
    redis: str = setting("redis://127.0.0.1:6379/0", help="URL of the request store")
    plugins: tuple[Path, ...] = setting((), help="directory with families that are not in this tree; repeatable")
    grace_seconds: float = setting(30.0, help="how long running requests may finish after SIGTERM")
    max_open_requests: int = setting(1_000, help="requests of a model that may be accepted and not ended")
    queue_limit: int = setting(256, help="claims that may wait for one service of a model when a request is accepted")
    worker_wait_seconds: float | None = setting(None, help="fail a request that found no live worker for so long")
    stage_attempts: int = setting(3, help="workers that a stage is tried on when they go away")
    record_seconds: float = setting(86_400.0, help="how long a request that has ended is remembered")
    result_seconds: float = setting(3_600.0, help="how long its files can be downloaded; at most record_seconds")
    max_message_bytes: int = setting(48 << 20, help="largest request that is read, with its pictures")
    max_artifact_bytes: int = setting(4 << 30, help="memory for what stages hand on, over all requests")
    max_raw_result_bytes: int = setting(1 << 30, help="largest .safetensors result")
    step_seconds: float = setting(0.1, help="shortest time between two progress events of a request's steps")
    heartbeat_seconds: float = setting(BEAT_SECONDS, help="how often the store hears from this coordinator")
    heartbeat_ttl_seconds: float = setting(TTL_SECONDS, help="after which silence it counts as dead")
    metrics_port: int | None = setting(None, help="port for Prometheus; unset serves no metrics")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting("INFO", help="least severe log lines to write")
    log_format: Literal["text", "json"] = setting("text", help="form of log lines")

    def __post_init__(self) -> None:
        for name in ("max_open_requests", "queue_limit", "stage_attempts", "record_seconds", "result_seconds"):
            if not vars(self)[name] > 0:
                raise SettingsError(f"{name} must be more than 0, not {vars(self)[name]}", field=name)
        if self.grace_seconds < 0:
            raise SettingsError(
                f"grace_seconds must not be negative, but is {self.grace_seconds}", field="grace_seconds"
            )
        if self.result_seconds > self.record_seconds:
            raise SettingsError(
                f"result_seconds must be at most record_seconds ({self.record_seconds:g}), not {self.result_seconds:g}",
                field="result_seconds",
            )
        if not 0 < self.heartbeat_seconds < self.heartbeat_ttl_seconds:
            raise SettingsError(
                "heartbeat_ttl_seconds must be longer than heartbeat_seconds", field="heartbeat_seconds"
            )

    @property
    def retention(self) -> Retention:
        """How long what has ended is kept."""
        return Retention(self.record_seconds, self.result_seconds)

    def limits(self, services: tuple[str, ...]) -> Limits:
        """What may be open and waiting for a model with these services."""
        return Limits(services, self.max_open_requests, self.queue_limit)
