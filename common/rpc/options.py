"""gRPC channel arguments of clients and servers, and limits of a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Options = tuple[tuple[str, Any], ...]

MAX_MESSAGE_BYTES = 16 << 20
"""Maximum size of a message in bytes. The largest messages are headers with inline tensors."""

MAX_METADATA_BYTES = 16 << 10
"""Maximum size of a call's metadata in bytes, in each direction. Calls with more end as RESOURCE_EXHAUSTED."""


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Limits and timeouts of a gRPC server.

    `message_bytes`: maximum size of a message.
    `streams`: concurrent calls per connection; further calls of the client wait.
    `calls`: concurrent calls of the fleet's methods in the process; further calls are refused.
    `connections`: connections per listen address; further connections are closed.
    `handshake_seconds`: timeout of the TLS and HTTP/2 handshakes.
    `request_seconds`: timeout for the request message of a call.
    `connection_idle_seconds`: a connection without calls is closed after this time.
    `connection_age_seconds`: every connection is closed after this time, once its calls have ended (at most one day
    later), so that a peer's certificate is verified again.
    """

    message_bytes: int = MAX_MESSAGE_BYTES
    streams: int = 1_024
    calls: int = 4_096
    connections: int = 1_024
    handshake_seconds: float = 20.0
    request_seconds: float = 30.0
    connection_idle_seconds: float = 300.0
    connection_age_seconds: float = 3_600.0


_LONGEST_CALL_MS = 86_400_000

# Equal soft and hard limits: between the two, gRPC refuses calls at random.
_METADATA: Options = (
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
)

# A dead peer is detected within 10 s, during calls and between them. While another ping of gRPC is unanswered, such as
# a bandwidth probe, no keepalive ping is sent, and grpc.http2.ping_timeout_ms applies, by default 1 min.
_KEEPALIVE: Options = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

NO_PROXY: Options = (("grpc.enable_http_proxy", 0),)
"""Arguments for connections within the fleet and on this host, for which gRPC must ignore http_proxy."""

CHANNEL_OPTIONS: Options = (
    *_KEEPALIVE,
    *_METADATA,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name, the timeout of a connection attempt; busy and remote peers need several seconds. A refused
    # connection fails immediately, and is retried after the backoff of the other two settings.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def server_options(limits: ServerLimits) -> Options:
    """Return the arguments of a server. SO_REUSEPORT is disabled, so that a second server on a port fails."""
    return (
        *_KEEPALIVE,
        *_METADATA,
        ("grpc.max_concurrent_streams", limits.streams),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.server_handshake_timeout_ms", round(limits.handshake_seconds * 1e3)),
        ("grpc.max_connection_idle_ms", round(limits.connection_idle_seconds * 1e3)),
        ("grpc.max_connection_age_ms", round(limits.connection_age_seconds * 1e3)),
        ("grpc.max_connection_age_grace_ms", _LONGEST_CALL_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
    )
