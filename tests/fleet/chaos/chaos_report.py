"""Report of a chaos run: a table by kind of fault, and statistics of requests."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from chaos_checks import Stored
from chaos_clients import Outcome
from chaos_faults import InjectedFault
from chaos_plan import Kind, Plan

from common.state.records import is_terminal
from fleet.v1 import generation_pb2 as pb


@dataclass
class Denoising:
    """How often the denoising of a request resumed or restarted after completed steps, from its events.

    `redone` is the number of repeated steps.
    """

    resumed: int = 0
    restarted: int = 0
    redone: int = 0

    @classmethod
    def of(cls, events: Sequence[pb.Event]) -> Denoising:
        """Count from events. Step 0 marks the start of an attempt; the loop resumed if the next step is above 1."""
        found, last, is_new = cls(), 0, False
        for progress in (event.progress for event in events if event.progress.service == "denoising"):
            if progress.step == 0:
                is_new = True
                continue
            if is_new and last:
                # Quick steps may share one report, so the first reported step of an attempt may exceed `last` + 1.
                found.resumed += progress.step > 1
                found.restarted += progress.step == 1
                found.redone += max(0, last - progress.step + 1)
            is_new, last = False, progress.step
        return found


@dataclass
class Latency:
    """Detection and recovery times of one kind of fault in seconds, over the affected requests."""

    detect: list[float] = field(default_factory=list)
    recover: list[float] = field(default_factory=list)

    def add(self, at_ms: float, events: Sequence[pb.Event]) -> None:
        """Add a request: time until it is restarted on a worker, and until its next progress."""
        began: float | None = None
        for event in events:
            moment = event.time.ToMilliseconds()
            if moment <= at_ms:
                continue
            is_begin = event.HasField("progress") and event.progress.step == 0
            if began is None and is_begin:
                began = moment
                self.detect.append((moment - at_ms) / 1_000)
            elif began is not None and (event.progress.step or is_terminal(event.state_change.state)):
                self.recover.append((moment - at_ms) / 1_000)
                return


@dataclass
class Report:
    """Results of a run. Without findings, all invariants hold."""

    plan: Plan
    seconds: float
    outcomes: Sequence[Outcome]
    stored: Mapping[str, Stored]
    injected: Sequence[InjectedFault]
    findings: Sequence[str]
    details: Sequence[str] = ()

    def table(self) -> str:
        """Format the report."""
        return "\n".join([*self._requests(), "", *self._faults()])

    def _requests(self) -> list[str]:
        states = Counter(pb.RequestState.Name(each.record.state)[14:].lower() for each in self.stored.values())
        denoised = [Denoising.of(each.events) for each in self.stored.values()]
        starts = Counter(event.progress.service for each in self.stored.values() for event in _begins(each.events))
        restarts = sum(starts.values()) - sum(
            len({event.progress.service for event in _begins(each.events)}) for each in self.stored.values()
        )
        rows = {
            "orders, clients, seconds": f"{len(self.plan.orders)}, {self.plan.clients}, {self.seconds:.1f}",
            "requests accepted": ", ".join([str(len(self.stored)), *(f"{n} {name}" for name, n in states.items())]),
            "calls that clients repeated": sum(outcome.retries for outcome in self.outcomes),
            "stages restarted": restarts,
            "requests taken over": sum(each.epoch > 1 for each in self.stored.values()),
            "denoisings resumed, restarted": f"{sum(each.resumed for each in denoised)}, "
            f"{sum(each.restarted for each in denoised)}",
            "steps redone": sum(each.redone for each in denoised),
        }
        return [f"{name:34} {value}" for name, value in rows.items()]

    def _faults(self) -> list[str]:
        lines = [f"{'fault':48} {'times':>5} {'hit':>4}  {'detect, median/max s':>20}  {'recover, median/max s':>21}"]
        whole = Latency()
        for kind in Kind:
            hits = [each for each in self.injected if each.fault.kind is kind]
            latency = Latency()
            for each in hits:
                for name in each.requests:
                    if name in self.stored:
                        latency.add(each.at_ms, self.stored[name].events)
            whole.detect += latency.detect
            whole.recover += latency.recover
            lines.append(_row(kind.value, len(hits), sum(len(each.requests) for each in hits), latency))
        hit = sum(len(each.requests) for each in self.injected)
        lines.append(_row("all (with a skewed clock in each process)", len(self.injected), hit, whole))
        return lines


def _begins(events: Sequence[pb.Event]) -> list[pb.Event]:
    return [event for event in events if event.HasField("progress") and event.progress.step == 0]


def _row(name: str, times: int, hit: int, latency: Latency) -> str:
    return f"{name:48} {times:5} {hit or '':>4}  {_span(latency.detect):>20}  {_span(latency.recover):>21}"


def _span(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} / {max(values):.2f}" if values else ""
