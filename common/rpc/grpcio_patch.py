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

from common.rpc.options import Options


def make_server(*, interceptors: Sequence[grpc.aio.ServerInterceptor] = (), options: Options = ()) -> grpc.aio.Server:
    """A server of methods that are added with add_registered_method_handlers, as generated code does; of no others."""
    # The class is not a parameter of grpc.aio.server, and the parameters of its own constructor change with versions.
    before = cygrpc.AioServer
    cygrpc.AioServer = _RegisteredOnly
    try:
        return grpc.aio.server(interceptors=interceptors, options=options)
    finally:
        cygrpc.AioServer = before


class _RegisteredOnly(cygrpc.AioServer):  # type: ignore[misc]  # of no type that mypy knows
    """The server beneath grpc.aio's. Its accepting loop asks for a future for each method, and one for all else."""

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        if method is not None:
            registered: asyncio.Future[Any] = super()._make_request_call_future(method)
            return registered
        return asyncio.ensure_future(self._refuse_all_else())

    async def _refuse_all_else(self) -> None:
        """Answer calls of unknown methods, until the server stops and the next one cannot be had."""
        refusals: set[asyncio.Task[None]] = set()
        while True:
            refusal = asyncio.create_task(_refuse(await self._request_call()))
            refusals.add(refusal)
            refusal.add_done_callback(refusals.discard)


async def _refuse(call: Any) -> None:
    context = cygrpc._ServicerContext(call, None, None, asyncio.get_running_loop())
    # The caller may be gone, and the abort tells what it does by an error.
    with suppress(grpc.aio.BaseError):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "there is no such method here")
