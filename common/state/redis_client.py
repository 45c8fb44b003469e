"""Names of redis-py that the fleet uses, imported without OpenTelemetry.

If OpenTelemetry is installed, redis-py imports its metrics, which the fleet does not use and which take 4 MB per
process.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import cast

_NAME = "opentelemetry"
_modules = cast("dict[str, ModuleType | None]", sys.modules)
_is_hidden = _NAME not in _modules
if _is_hidden:
    _modules[_NAME] = None
try:
    from redis.asyncio import Redis as Redis
    from redis.asyncio.client import Pipeline as Pipeline
    from redis.asyncio.retry import Retry as Retry
    from redis.asyncio.sentinel import Sentinel as Sentinel
    from redis.backoff import ExponentialBackoff as ExponentialBackoff
    from redis.exceptions import AuthenticationError as AuthenticationError
    from redis.exceptions import BusyLoadingError as BusyLoadingError
    from redis.exceptions import ConnectionError as ConnectionError
    from redis.exceptions import NoScriptError as NoScriptError
    from redis.exceptions import OutOfMemoryError as OutOfMemoryError
    from redis.exceptions import ReadOnlyError as ReadOnlyError
    from redis.exceptions import RedisError as RedisError
    from redis.exceptions import ResponseError as ResponseError
    from redis.exceptions import TimeoutError as TimeoutError
finally:
    if _is_hidden:
        del _modules[_NAME]
