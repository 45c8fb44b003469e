"""Checks the request store given to a command."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import fields

from common.errors import FailedPrecondition, InvalidInput
from common.settings import load_settings
from common.state.connection import connect
from common.state.store_server import StoreSettings

_VARIABLES = tuple(f"FLEET_{item.name.upper()}" for item in fields(StoreSettings))


def check_store(url: str, environ: Mapping[str, str] = os.environ) -> None:
    """Check the store before any process starts.

    Raises InvalidInput for a malformed URL or an unsuitable server, Unavailable for a server that does not answer.
    """
    given = {name: environ[name] for name in _VARIABLES if name in environ}
    asyncio.run(_check(url, load_settings(StoreSettings, (), prog="fleet", environ=given)))


async def _check(url: str, settings: StoreSettings) -> None:
    redis = connect(url)
    try:
        await settings.check_store(redis)
    except FailedPrecondition as error:
        raise InvalidInput(error.message, field="redis") from error
    finally:
        await redis.aclose()
