"""Health checks: readiness by service names, liveness by the name of the health service."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from common.rpc.fleet_server import FleetServer

LIVENESS = "grpc.health.v1.Health"
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


async def _statuses(address: str, *names: str) -> list[int]:
    async with grpc.aio.insecure_channel(address) as channel:
        check: grpc.aio.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        replies = [await check(health_pb2.HealthCheckRequest(service=name)) for name in names]
    return [reply.status for reply in replies]


def test_a_server_that_is_not_ready_is_live(tmp_path: Path) -> None:
    async def run() -> None:
        server = FleetServer(f"unix:{tmp_path}/s", health_listen=f"unix:{tmp_path}/h")
        server.add(None, "fleet.v1.WorkerService")
        await server.start()
        try:
            names = ("", "fleet.v1.WorkerService", LIVENESS)
            for address in (server.address, server.health_address):
                assert await _statuses(address, *names) == [NOT_SERVING, NOT_SERVING, SERVING]
            await server.set_ready(True)
            assert await _statuses(server.health_address, *names) == [SERVING, SERVING, SERVING]
            await server.set_ready(False)
            assert await _statuses(server.health_address, *names) == [NOT_SERVING, NOT_SERVING, SERVING]
            # A process that refuses calls, but still finishes requests, remains live and does not become ready.
            server.gate.close()
            await server.set_ready(True)
            assert await _statuses(server.health_address, *names) == [NOT_SERVING, NOT_SERVING, SERVING]
        finally:
            await server.drain(0)

    asyncio.run(run())
