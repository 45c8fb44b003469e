"""What connections are opened and accepted with: channel arguments, and the bounds of a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Options = tuple[tuple[str, Any], ...]

MAX_MESSAGE_BYTES = 16 << 20
"""Largest message of a stage RPC: a header with its inline tensors; chunks are far smaller."""

MAX_METADATA_BYTES = 16 << 10
"""Most metadata that a call may carry, either way; calls with more are RESOURCE_EXHAUSTED."""


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What a server takes on at a time, and how long it waits for peers that send nothing.

    A message has `message_bytes` at most, a connection `streams` calls (a client's further calls wait for one of them
    to end), the process `calls` of the fleet's own methods and `connections` for each address; those beyond are closed.
    A new connection must have shown that it speaks TLS and HTTP/2 within `handshake_seconds`, and a call for one
    message must have sent it within `request_seconds`. A connection without calls is closed after
    `connection_idle_seconds`, any other after `connection_age_seconds`, once its calls have ended, for which they have
    a day: so no certificate of a peer counts for longer.
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

# Soft and hard limit are one: between them gRPC refuses calls by chance.
_METADATA: Options = (
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
)

# A peer that vanished without a word is noticed within ten seconds, during calls and between them. Where one of gRPC's
# other pings is unanswered, such as those that measure bandwidth, none is sent for keepalive, and its own limit counts:
# a minute by default.
_KEEPALIVE: Options = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

NO_PROXY: Options = (("grpc.enable_http_proxy", 0),)
"""For connections within the fleet and on this host: gRPC would send them to the proxy that http_proxy names."""

CHANNEL_OPTIONS: Options = (
    *_KEEPALIVE,
    *_METADATA,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long an attempt to connect may take, whatever its name says: a busy peer, or a far one, needs a while. Where
    # nobody listens, an attempt fails at once, and the next one follows by the other two.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def server_options(limits: ServerLimits) -> Options:
    """Arguments of a server. Two servers on one port are an error, not load balancing."""
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
