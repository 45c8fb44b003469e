"""Asks a server whether it is ready, for the health checks of containers: python -m common.rpc.probe ADDRESS."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SECONDS = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the server at the address says SERVING, 1 when it does not, 2 without an address."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m common.rpc.probe ADDRESS\n")
        return 2
    with grpc.insecure_channel(arguments[0]) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_SECONDS)
        except grpc.RpcError:
            return 1
    return 0 if reply.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
