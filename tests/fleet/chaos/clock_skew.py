"""Skews the wall clock of a process, as on a host without clock synchronization."""

from __future__ import annotations

import datetime as datetime_module
import importlib
import sys
import time
import types
from datetime import datetime, timedelta, tzinfo
from typing import Self


def skew_clock(seconds: float) -> None:
    """Skew the time of day in this process; the monotonic clock is unchanged.

    gRPC's Python code reads the true clock, as it passes deadlines to gRPC's core, which reads the kernel's clock. On a
    host with a skewed clock, both clocks would be equal.
    """
    importlib.import_module("grpc._channel")  # otherwise loaded later, by the first synchronous channel
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
        """datetime with a skewed now()."""

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
    """Replace datetime in every module that has imported it by any name, and for later imports."""
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType) and module is not sys.modules[__name__]:
            for name in [name for name, value in vars(module).items() if value is datetime]:
                setattr(module, name, skewed)
