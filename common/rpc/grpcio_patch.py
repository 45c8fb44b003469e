"""An asyncio gRPC server that a wrong path does not end.

A call's path may be any bytes. grpcio (1.85 at least) decodes them as UTF-8 in the loop that accepts calls, for every
method that is not registered by name, and a path that is not UTF-8 ends the loop, and with it the server: one frame of
anybody's who reaches the port. Here every method is registered, so that gRPC's core finds it by its bytes, and what is
not is refused without a look at its path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import grpc
from grpc._cython import cygrpc

from common.package_guard import Called, Parameters, PrivateApi, check_private_api, unsupported
from common.rpc.options import Options

_SERVER = "grpc._cython.cygrpc:AioServer"
_CONTEXT = "grpc._cython.cygrpc:_ServicerContext"
GRPCIO = PrivateApi(
    "grpcio",
    "the server",
    (
        Parameters(f"{_SERVER}._make_request_call_future", ("self", "method_bytes")),
        Called(f"{_SERVER}._request_call", 1),
        Called(f"{_CONTEXT}.abort", 3),
    ),
)
"""The private functions of grpcio that this module calls and overrides."""
_PROBE_SECONDS = 5.0


def make_server(*, interceptors: Sequence[grpc.aio.ServerInterceptor] = (), options: Options = ()) -> grpc.aio.Server:
    """A server of methods that are added with add_registered_method_handlers, as generated code does; of no others."""
    return _make_server(_registered_only(), interceptors, options)


async def check_server() -> None:
    """Check that this grpcio lets the server refuse unknown methods: with a server that opens no port.

    Raises UnsupportedPackage, which says what to install.
    """
    check_private_api(GRPCIO)
    asked = asyncio.Event()

    class Probe(_registered_only()):  # type: ignore[misc]  # of no type that mypy knows
        def _refuse_all_else(self) -> Any:
            asked.set()
            return super()._refuse_all_else()

    try:
        cygrpc._ServicerContext(None, None, None, asyncio.get_running_loop())
    except TypeError:
        raise unsupported("grpcio", "the server relies on _ServicerContext with four arguments") from None
    server = _make_server(Probe, (), ())
    await server.start()
    try:
        await asyncio.wait_for(asked.wait(), _PROBE_SECONDS)
    except TimeoutError:
        reason = "the server relies on AioServer._make_request_call_future, which is not called for unknown methods"
        raise unsupported("grpcio", reason) from None
    finally:
        await server.stop(None)


def _make_server(
    server_class: type[Any], interceptors: Sequence[grpc.aio.ServerInterceptor], options: Options
) -> grpc.aio.Server:
    # The class is not a parameter of grpc.aio.server, and the parameters of its own constructor change with versions.
    before = cygrpc.AioServer
    cygrpc.AioServer = server_class
    try:
        return grpc.aio.server(interceptors=interceptors, options=options)
    finally:
        cygrpc.AioServer = before


def _registered_only() -> type[Any]:
    """The class of the server beneath grpc.aio's: made at its use, as a grpcio without the base must be reported."""

    class RegisteredOnly(cygrpc.AioServer):  # type: ignore[misc]  # of no type that mypy knows
        """Its accepting loop asks for a future for each method, and one for all else."""

        def _make_request_call_future(self, method_bytes: bytes | None) -> asyncio.Future[Any]:
            if method_bytes is not None:
                registered: asyncio.Future[Any] = super()._make_request_call_future(method_bytes)
                return registered
            return asyncio.ensure_future(self._refuse_all_else())

        async def _refuse_all_else(self) -> None:
            """Answer calls of unknown methods, until the server stops and the next one cannot be had."""
            refusals: set[asyncio.Task[None]] = set()
            while True:
                refusal = asyncio.create_task(_refuse(await self._request_call()))
                refusals.add(refusal)
                refusal.add_done_callback(refusals.discard)

    return RegisteredOnly


async def _refuse(call: Any) -> None:
    context = cygrpc._ServicerContext(call, None, None, asyncio.get_running_loop())
    # The caller may be gone, and the abort tells what it does by an error.
    with suppress(grpc.aio.BaseError):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "there is no such method here")
