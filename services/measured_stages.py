"""Metrics of a worker's device: seconds per step, busy and idle time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from common.metrics import DEVICE_BUSY_SECONDS, DEVICE_IDLE_SECONDS, STEP_SECONDS, observe, work_label
from common.rpc.stage_servicer import Stages
from common.stage import Call, Contract


class MeasuredStages:
    """Stages with metrics. The device is busy while at least one call or session runs.

    The step time excludes the first step of a call, which includes the preparation of the loop.
    """

    def __init__(self, stages: Stages, service: str, model: str) -> None:
        self.contract = stages.contract
        self._stages = stages
        self._labels = (service, model)
        self._lock = threading.Lock()
        self._running = 0
        self._since: float | None = None
        """`time.monotonic()` timestamp of the last start, step or end of a call."""
        # Creates the series, so that a worker without requests exports zeros.
        DEVICE_BUSY_SECONDS.labels(*self._labels)
        DEVICE_IDLE_SECONDS.labels(*self._labels)

    def contract_of(self, variant: str) -> Contract:
        """The contract of a variant. Raises InvalidInput for a variant that is not served."""
        return self._stages.contract_of(variant)

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """Run the stages, and update the metrics."""
        with self._on_device():
            return self._stages.run(values, replace(call, on_progress=self._timed(call)))

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        """Add the time since the last change to the busy or idle time. `by`: 1 at a start, -1 at an end, else 0."""
        now = time.monotonic()
        with self._lock:
            was_running, self._running = self._running > 0, self._running + by
            since, self._since = self._since, now
        if was_running and since is not None:
            DEVICE_BUSY_SECONDS.labels(*self._labels).inc(now - since)
        elif since is not None:
            observe(DEVICE_IDLE_SECONDS.labels(*self._labels), now - since)

    def _timed(self, call: Call) -> Callable[[int, int], None]:
        histogram = STEP_SECONDS.labels(*self._labels, work_label(call.tokens))
        last: tuple[int, float] | None = None

        def progress(step: int, total_steps: int) -> None:
            nonlocal last
            self._change(0)  # Otherwise, PromQL's rate() would return 0 during a call longer than its window.
            now = time.monotonic()
            if last is not None and step > last[0]:
                observe(histogram, (now - last[1]) / (step - last[0]))
            last = step, now
            call.on_progress(step, total_steps)

        return progress
