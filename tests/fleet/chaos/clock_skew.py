"""Gives a process a wrong wall clock, as a host has whose clock nobody sets."""

from __future__ import annotations

import datetime as datetime_module
import importlib
import sys
import time
import types
from datetime import datetime, timedelta, tzinfo
from typing import Self


def skew_clock(seconds: float) -> None:
    """Move what this process reads as the time of day; the monotonic clock stays.

    gRPC's Python half keeps the true clock: it hands deadlines to its core, which asks the kernel. On a host whose
    clock is wrong both would be, and differ by nothing.
    """
    importlib.import_module("grpc._channel")  # which a first synchronous channel would load later
    true = types.ModuleType("time")
    vars(true).update(vars(time))
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "grpc" and vars(module).get("time") is time:
            vars(module)["time"] = true
    now, now_ns = time.time, time.time_ns
    vars(time).update(time=lambda: now() + seconds, time_ns=lambda: now_ns() + int(seconds * 1e9))
    _replace_datetime(_skewed_datetime(seconds))


def _skewed_datetime(seconds: float) -> type[datetime]:
    class SkewedDatetime(datetime):
        """datetime whose now is elsewhere."""

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + timedelta(seconds=seconds)

        @classmethod
        def utcnow(cls) -> Self:
            return cls.now(datetime_module.UTC).replace(tzinfo=None)

        @classmethod
        def today(cls) -> Self:
            return cls.now()

    return SkewedDatetime


def _replace_datetime(skewed: type[datetime]) -> None:
    """In every module that has imported the class, by whatever name, and for those to come."""
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType) and module is not sys.modules[__name__]:
            for name in [name for name, value in vars(module).items() if value is datetime]:
                setattr(module, name, skewed)
