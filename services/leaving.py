"""Shutdown of a worker: withdraws it, hands over or finishes running calls, and stops its server."""

from __future__ import annotations

import asyncio
from functools import partial

from common.errors import Unavailable
from common.logs import get_logger
from common.rpc.fleet_server import FleetServer
from common.rpc.hand_over import HandOver
from common.rpc.stage_servicer import StageServicer
from common.state.workers import WorkerRegistry
from fleet.v1 import worker_pb2

_log = get_logger(__name__)


async def leave(
    info: worker_pb2.WorkerInfo, registry: WorkerRegistry, server: FleetServer, servicer: StageServicer, grace: float
) -> None:
    """Withdraw the worker, and end its calls and its server within `grace` seconds."""
    began = asyncio.get_running_loop().time()
    try:
        await registry.withdraw(info.worker_id, grace_seconds=grace)
    except Unavailable as error:
        _log.warning("worker not withdrawn from the request store", error=error)
    left = max(0.0, grace - (asyncio.get_running_loop().time() - began))
    handing = asyncio.create_task(HandOver(servicer.running, partial(registry.free_slots, info)).run(left))
    try:
        await server.drain(left)
    finally:
        handing.cancel()
        await asyncio.wait({handing})
