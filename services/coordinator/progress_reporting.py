"""Converts the progress of a request's stages to events, and counts the completed denoising steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from common.pipeline import ServiceSpec
from common.rpc.framing import Packet
from common.stage import Call, Contract
from common.state.records import State, state_event
from fleet.v1 import generation_pb2
from services.coordinator.events import EventWriter
from services.coordinator.worker_runner import WorkerRunner


class RequestProgress:
    """The progress of one request.

    The initial total is the number of denoising steps for a service that reports steps, and 1 for other services. A
    service may later report a larger total, such as the frames of a video or the steps of all blocks.
    """

    def __init__(self, record: generation_pb2.RequestRecord, events: EventWriter) -> None:
        self._events = events
        self._steps = record.parameters.num_inference_steps
        self._steps_done = 0
        self._begun = record.state == State.REQUEST_STATE_RUNNING

    @property
    def steps_left(self) -> int:
        """Denoising steps that no worker has reported as completed."""
        return max(0, self._steps - self._steps_done)

    def begin(self, spec: ServiceSpec) -> None:
        """Report that a worker has started a service. The first report makes the request RUNNING."""
        if not self._begun:
            self._begun = True
            self._events.add(state_event(State.REQUEST_STATE_RUNNING))
        self._events.progress(spec.service, 0, self._steps if spec.reports_steps else 1)

    def step(self, spec: ServiceSpec, step: int, total_steps: int) -> None:
        """Report that a worker has completed `step` of `total_steps`."""
        if spec.reports_steps:
            self._steps_done, self._steps = step, max(self._steps, total_steps)
        self._events.progress(spec.service, step, total_steps)


@dataclass(frozen=True)
class ProgressReportingRunner:
    """A runner that reports its progress as events. If the worker reports no steps, completion counts as one step."""

    runner: WorkerRunner
    spec: ServiceSpec
    progress: RequestProgress

    @property
    def contract(self) -> Contract:
        """The contract of the wrapped runner."""
        return self.runner.contract

    async def __call__(self, values: Mapping[str, Packet], call: Call) -> Mapping[str, Packet]:
        """Run the service, and report its progress."""
        steps: list[int] = []

        def on_progress(step: int, total_steps: int) -> None:
            steps.append(step)
            self.progress.step(self.spec, step, total_steps)

        outputs = await self.runner(values, replace(call, on_progress=on_progress))
        if not steps:
            self.progress.step(self.spec, 1, 1)
        return outputs
