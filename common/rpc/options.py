"""Channel arguments that both sides of every connection share."""

from __future__ import annotations

from typing import Any

Options = tuple[tuple[str, Any], ...]

MAX_MESSAGE_BYTES = 16 << 20
"""Largest message of a stage RPC: a header with its inline tensors; chunks are far smaller."""

MAX_METADATA_BYTES = 16 << 10
"""Most metadata that a call may carry, either way; calls with more are RESOURCE_EXHAUSTED."""
MAX_STREAMS = 1024
"""Most calls that a server takes at a time on one connection; a client's further calls wait for one of them to end."""

# Soft and hard limit are one: between them gRPC refuses calls by chance.
_METADATA: Options = (
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
)

# A peer that vanished without a word is noticed within ten seconds, during calls and between them.
_KEEPALIVE: Options = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

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


def server_options(max_message_bytes: int = MAX_MESSAGE_BYTES, max_streams: int = MAX_STREAMS) -> Options:
    """Arguments of a server. Two servers on one port are an error, not load balancing."""
    return (
        *_KEEPALIVE,
        *_METADATA,
        ("grpc.max_concurrent_streams", max_streams),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
    )
