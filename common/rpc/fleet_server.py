"""gRPC server of all services: health checks, reflection, bound address and graceful shutdown."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.errors import FailedPrecondition
from common.rpc.address import bound_address, check_listenable, socket_path, target_of
from common.rpc.grpcio_patch import make_server
from common.rpc.interceptor import Admit, CallGate, admit_all
from common.rpc.options import ServerLimits, server_options
from common.rpc.wrapping import Handler

_FLUSH_SECONDS = 0.5  # time to send the last bytes of ended calls; bounded, because health watches never end


class FleetServer:
    """One gRPC server. Add servicers to `grpc_server` or with add(), then call start(), set_ready() and drain().

    Without `credentials`, connections are not encrypted. `admit` authorizes callers of the fleet's methods.
    `health_listen` is a second, unencrypted address for health checks, because kubelets and other probes have no
    certificates. The health of the service `grpc.health.v1.Health`, for liveness probes, is SERVING until drain().
    """

    def __init__(
        self,
        listen: str,
        *,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        limits: ServerLimits | None = None,
        credentials: grpc.ServerCredentials | None = None,
        admit: Admit = admit_all,
        health_listen: str = "",
    ) -> None:
        self._listen = listen
        self._credentials = credentials
        self._limits = limits or ServerLimits()
        self.gate = CallGate(admit, self._limits)
        self.grpc_server = make_server(interceptors=[*interceptors, self.gate], options=server_options(self._limits))
        self._health = health.aio.HealthServicer()
        self._services: list[str] = []
        self.address = ""
        self.health_address = ""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        self._health_listen = health_listen
        self._health_server: grpc.aio.Server | None = None

    def add(self, methods: Mapping[str, Handler] | None, service_name: str) -> None:
        """Register the methods of a service by name, and the service for health checks and reflection.

        `methods` is None if a generated add_…_to_server function has registered the methods.
        """
        if methods is not None:
            self.grpc_server.add_registered_method_handlers(service_name, dict(methods))
        self._services.append(service_name)

    async def start(self) -> str:
        """Bind the address and start serving with health NOT_SERVING. Returns the address with the bound port.

        Raises FailedPrecondition if the address cannot be bound.
        """
        names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc_server)
        await self.set_ready(False)
        await self._health.set(health.SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
        self.address = _bind(self.grpc_server, self._listen, self._credentials)
        if self._health_listen:
            self._health_server = make_server(interceptors=[CallGate()], options=server_options(ServerLimits()))
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)
            self.health_address = _bind(self._health_server, self._health_listen, None)
            await self._health_server.start()
        await self.grpc_server.start()
        return self.address

    async def set_ready(self, ready: bool) -> None:
        """Set the health of the server as a whole ("") and of each of its services.

        A server whose gate is closed is never ready.
        """
        for name in ("", *self._services):
            await self._set_health(name, ready)

    async def set_method_ready(self, name: str, ready: bool) -> None:
        """Set the health of the method `name`, SERVICE/METHOD. With a closed gate, it is never ready."""
        await self._set_health(name, ready)

    async def _set_health(self, name: str, ready: bool) -> None:
        is_served = ready and not self.gate.closed
        status = health_pb2.HealthCheckResponse.SERVING if is_served else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(name, status)

    async def drain(self, grace: float) -> None:
        """Set health NOT_SERVING, refuse new calls, wait up to `grace` seconds for calls in flight, and stop."""
        await self._health.enter_graceful_shutdown()
        self.gate.close()
        try:
            async with asyncio.timeout(grace):
                await self.gate.wait_idle()
        except TimeoutError:
            pass
        await self.grpc_server.stop(_FLUSH_SECONDS if grace else None)
        if self._health_server is not None:
            await self._health_server.stop(None)
        for listen in (self._listen, self._health_listen):
            if listen.startswith("unix:"):
                socket_path(listen).unlink(missing_ok=True)


def _bind(server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None) -> str:
    """Bind a server. Returns the address with the bound port. Raises FailedPrecondition."""
    check_listenable(listen)
    target = target_of(listen)
    try:
        if credentials is None:
            return bound_address(listen, server.add_insecure_port(target))
        return bound_address(listen, server.add_secure_port(target, credentials))
    except (RuntimeError, ValueError) as error:
        raise FailedPrecondition(f"cannot listen on {listen}: {error}", field="listen") from None


@asynccontextmanager
async def stop_signals() -> AsyncIterator[asyncio.Event]:
    """Yield an event that SIGTERM and SIGINT set, instead of ending the process."""
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
