"""What the stages of a request tell, on its way into events; and how many steps of its loop are done."""

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
    """Progress of one request.

    A service that reports steps begins with a total of the request's steps, every other service with a total of one; it
    may report a larger total later, such as the frames of a video, or the steps of all its blocks.
    """

    def __init__(self, record: generation_pb2.RequestRecord, events: EventWriter) -> None:
        self._events = events
        self._steps = record.parameters.num_inference_steps
        self._steps_done = 0
        self._begun = record.state == State.REQUEST_STATE_RUNNING

    @property
    def steps_left(self) -> int:
        """Steps of the loop that no worker has reported as done."""
        return max(0, self._steps - self._steps_done)

    def begin(self, spec: ServiceSpec) -> None:
        """A worker begins on a service; with the first one, the request runs."""
        if not self._begun:
            self._begun = True
            self._events.add(state_event(State.REQUEST_STATE_RUNNING))
        self._events.progress(spec.service, 0, self._steps if spec.reports_steps else 1)

    def step(self, spec: ServiceSpec, step: int, total_steps: int) -> None:
        """A worker came so far."""
        if spec.reports_steps:
            self._steps_done, self._steps = step, max(self._steps, total_steps)
        self._events.progress(spec.service, step, total_steps)


@dataclass(frozen=True)
class ProgressReportingRunner:
    """A runner whose progress becomes that of its request. One that tells no steps has done one at its end."""

    runner: WorkerRunner
    spec: ServiceSpec
    progress: RequestProgress

    @property
    def contract(self) -> Contract:
        """The runner's."""
        return self.runner.contract

    async def __call__(self, values: Mapping[str, Packet], call: Call) -> Mapping[str, Packet]:
        """Run, and report."""
        steps: list[int] = []

        def on_progress(step: int, total_steps: int) -> None:
            steps.append(step)
            self.progress.step(self.spec, step, total_steps)

        outputs = await self.runner(values, replace(call, on_progress=on_progress))
        if not steps:
            self.progress.step(self.spec, 1, 1)
        return outputs
