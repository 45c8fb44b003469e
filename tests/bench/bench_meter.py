"""Time and peak memory of parts of a computation, and call counts of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from bench_device import empty, now
from torch import nn


class Meter:
    """Measures time and peak memory of named parts, which may be nested.

    `spent` is the time in ms since clear(), summed over the runs of a part; `peaks` are peak bytes above the bytes in
    use at rebase(), including the warm-up.
    """

    def __init__(self, device: torch.device) -> None:
        self.spent: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        self._device = device
        self._open: list[str] = []
        self.rebase()

    def rebase(self) -> None:
        """Count the memory in use now as weights."""
        empty(self._device)
        self._base = torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def clear(self) -> None:
        """Reset the times, after a warm-up."""
        self.spent.clear()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure the block."""
        self._note_peak()
        self._open.append(name)
        began = now(self._device)
        yield
        self.spent[name] = self.spent.get(name, 0.0) + 1e3 * (now(self._device) - began)
        self._note_peak()
        self._open.pop()

    @contextmanager
    def watching(self, methods: Mapping[tuple[type, str], str]) -> Iterator[None]:
        """Measure every call of the methods as a named part, in the block."""
        with ExitStack() as stack:
            for (owner, method), name in methods.items():
                stack.enter_context(patch.object(owner, method, self._measured(vars(owner)[method], name)))
            yield

    def _measured(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **keywords: Any) -> Any:
            with self.part(name):
                return function(*args, **keywords)

        return run

    def _note_peak(self) -> None:
        if self._device.type != "cuda":
            return
        peak = float(torch.cuda.max_memory_allocated(self._device) - self._base)
        for name in self._open:
            self.peaks[name] = max(self.peaks.get(name, 0.0), peak)
        torch.cuda.reset_peak_memory_stats(self._device)


class CallCount:
    """Counts the calls of a module."""

    def __init__(self, module: nn.Module) -> None:
        self._calls = 0
        module.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self._calls += 1

    def take(self) -> int:
        """Calls since the previous take()."""
        calls, self._calls = self._calls, 0
        return calls
