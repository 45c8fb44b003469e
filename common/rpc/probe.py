"""Health probe for containers: `python -m common.rpc.probe ADDRESS`.

Exit code 0: the server is SERVING. 1: the server is not SERVING or does not respond; stderr has one line, which
`docker inspect` shows. 2: wrong usage. If FLEET_HEALTH_LISTEN is set, the probe uses that address on this host instead
of ADDRESS; a server with TLS serves health checks without certificates only there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2

from common.rpc.address import target_of
from common.rpc.options import NO_PROXY

_SECONDS = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """Probe the address in the only argument, and return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m common.rpc.probe ADDRESS\n")
        return 2
    (address,) = arguments
    if health := os.environ.get("FLEET_HEALTH_LISTEN", ""):
        address = health if health.startswith("unix:") else f"127.0.0.1:{health.rpartition(':')[2]}"
    if fault := health_fault(address):
        sys.stderr.write(f"{address} {fault}\n")
        return 1
    return 0


def health_fault(address: str) -> str:
    """Check the health of a server without TLS. Returns the fault, such as "is not serving"; empty if SERVING."""
    with grpc.insecure_channel(target_of(address), options=NO_PROXY) as channel:
        check: grpc.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            status = check(health_pb2.HealthCheckRequest(), timeout=_SECONDS).status
        except grpc.RpcError as error:
            return f"does not respond: {error.code().name}"
    return "" if status == health_pb2.HealthCheckResponse.SERVING else "is not serving"


if __name__ == "__main__":
    sys.exit(main())
