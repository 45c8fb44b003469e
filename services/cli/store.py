"""The request store that a command was given."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import FailedPrecondition, InvalidInput
from common.settings import load_settings, setting
from common.state.connection import connect
from common.state.store_server import check_server

_VARIABLES = ("FLEET_ALLOW_EVICTION", "FLEET_ALLOW_DATA_LOSS")


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """Variables that the services read too: what a store may be that a command is given."""

    allow_eviction: bool = setting(False, help="start on a store whose maxmemory-policy may delete accepted requests")
    allow_data_loss: bool = setting(False, help="omit the warning that the store is not durable")


def check_store(url: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse a store before anything starts.

    Raises InvalidInput for what is no URL and for a server that cannot hold requests, Unavailable for a server that
    does not answer.
    """
    given = {name: environ[name] for name in _VARIABLES if name in environ}
    asyncio.run(_check(url, load_settings(StoreSettings, (), prog="fleet", environ=given)))


async def _check(url: str, settings: StoreSettings) -> None:
    redis = connect(url)
    try:
        await check_server(redis, allow_eviction=settings.allow_eviction, allow_data_loss=settings.allow_data_loss)
    except FailedPrecondition as error:
        raise InvalidInput(error.message, field="redis") from error
    finally:
        await redis.aclose()
