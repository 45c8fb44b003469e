"""A gRPC server as every service of the fleet runs one: health, reflection, an address, a graceful end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.errors import FailedPrecondition
from common.rpc.address import bound_address, check_listenable, socket_path
from common.rpc.interceptor import CallGate
from common.rpc.options import MAX_MESSAGE_BYTES, server_options

_FLUSH_SECONDS = 0.5  # for the last bytes of calls that ended, and for health watches that never do


class FleetServer:
    """One listening server. Add servicers to `grpc_server` or `add`, start, say when it is ready, drain."""

    def __init__(
        self,
        listen: str,
        *,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._listen = listen
        self.gate = CallGate()
        self.grpc_server: grpc.aio.Server = grpc.aio.server(
            interceptors=[*interceptors, self.gate], options=server_options(max_message_bytes)
        )
        self._health = health.aio.HealthServicer()
        self._services: list[str] = []
        self.address = ""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)

    def add(self, handler: grpc.GenericRpcHandler | None, service_name: str) -> None:
        """Serve a handler, and list its service for health checks and reflection.

        Handlers that a generated add_…_to_server function has added already are None here.
        """
        if handler is not None:
            self.grpc_server.add_generic_rpc_handlers((handler,))
        self._services.append(service_name)

    async def start(self) -> str:
        """Bind and serve, as not ready yet; returns the address, with the port that was bound.

        Raises FailedPrecondition when the address cannot be had.
        """
        names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc_server)
        await self.set_ready(False)
        check_listenable(self._listen)
        try:
            port = self.grpc_server.add_insecure_port(self._listen)
        except (RuntimeError, ValueError) as error:
            raise FailedPrecondition(f"cannot listen on {self._listen}: {error}", field="listen") from None
        await self.grpc_server.start()
        self.address = bound_address(self._listen, port)
        return self.address

    async def set_ready(self, ready: bool) -> None:
        """What health checks are told, for the server as a whole ("") and for each of its services."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, status)

    async def drain(self, grace: float) -> None:
        """Say not ready, refuse new calls, let those in flight finish within `grace` seconds, end."""
        await self._health.enter_graceful_shutdown()
        self.gate.close()
        try:
            async with asyncio.timeout(grace):
                await self.gate.wait_idle()
        except TimeoutError:
            pass
        await self.grpc_server.stop(_FLUSH_SECONDS if grace else None)
        if self._listen.startswith("unix:"):
            socket_path(self._listen).unlink(missing_ok=True)


@asynccontextmanager
async def stop_signals() -> AsyncIterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set, instead of ending the process."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    caught = (signal.SIGTERM, signal.SIGINT)
    for each in caught:
        loop.add_signal_handler(each, stop.set)
    try:
        yield stop
    finally:
        for each in caught:
            loop.remove_signal_handler(each)
