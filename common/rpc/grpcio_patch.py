"""Patch of grpcio's asyncio server, so that a call with a non-UTF-8 path does not stop the server.

A call's path may contain arbitrary bytes. For methods that are not registered by name, grpcio 1.85 decodes the path as
UTF-8 in its accept loop. A path that is not UTF-8 ends the loop, so that any client can stop the server with one frame.
Here, all methods are registered, so that gRPC core matches paths as bytes, and calls of other methods are refused
without decoding their paths.
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
    """Return a server of registered methods only.

    Generated code registers methods with add_registered_method_handlers().
    """
    return _make_server(_registered_only(), interceptors, options)


async def check_server() -> None:
    """Check that the patch works with the installed grpcio, with a server that opens no port.

    Raises UnsupportedPackage with the version to install.
    """
    check_private_api(GRPCIO)
    asked = asyncio.Event()

    class Probe(_registered_only()):  # type: ignore[misc]  # AioServer has no type stub
        def _refuse_unknown(self) -> Any:
            asked.set()
            return super()._refuse_unknown()

    try:
        cygrpc._ServicerContext(None, None, None, asyncio.get_running_loop())
    except TypeError:
        reason = f"the server relies on {_CONTEXT.replace(':', '.')}, which does not accept four arguments"
        raise unsupported("grpcio", reason) from None
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
    # grpc.aio.server has no parameter for the class, and the parameters of its constructor change between releases.
    before = cygrpc.AioServer
    cygrpc.AioServer = server_class
    try:
        return grpc.aio.server(interceptors=interceptors, options=options)
    finally:
        cygrpc.AioServer = before


def _registered_only() -> type[Any]:
    """Return a subclass of AioServer. Not defined at import, because check_server() reports a missing AioServer."""

    class RegisteredOnly(cygrpc.AioServer):  # type: ignore[misc]  # AioServer has no type stub
        """AioServer whose accept loop refuses calls of methods that are not registered."""

        def _make_request_call_future(self, method_bytes: bytes | None) -> asyncio.Future[Any]:
            if method_bytes is not None:
                registered: asyncio.Future[Any] = super()._make_request_call_future(method_bytes)
                return registered
            return asyncio.ensure_future(self._refuse_unknown())

        async def _refuse_unknown(self) -> None:
            """Refuse calls of unknown methods until the server stops."""
            refusals: set[asyncio.Task[None]] = set()
            while True:
                refusal = asyncio.create_task(_refuse(await self._request_call()))
                refusals.add(refusal)
                refusal.add_done_callback(refusals.discard)

    return RegisteredOnly


async def _refuse(call: Any) -> None:
    context = cygrpc._ServicerContext(call, None, None, asyncio.get_running_loop())
    # abort() raises AbortError, and other errors if the client has disconnected.
    with suppress(grpc.aio.BaseError):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the method is not implemented by this server")
