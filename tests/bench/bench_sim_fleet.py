"""Discrete-event simulation of one model's stages, their queues, and replicas controlled by a policy.

A replica serves after its load time and costs GPU seconds from start to end. On scale-in, a loading or idle replica
ends at once; a busy replica finishes its request and accepts no further request.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from common.scaling import StageLoad, StageWork

ROUTE = (("text_encoding", "image_encoding"), ("denoising",), ("decoding",))
"""Services in order; services of one group run concurrently."""
ASSUMED_SECONDS = 10.0  # assumed time of a request at a stage without measurements
_PACE_DECAY = 0.8  # weight of earlier requests in a pace, relative to the next request
_LONGEST = 5  # longest simulated time, as a multiple of the duration of the trace


@dataclass(frozen=True)
class Kind:
    """Requests of one shape: work and seconds per stage, and the SLO latency in seconds."""

    name: str
    work: Mapping[str, StageWork]
    seconds: Mapping[str, float]
    slo_seconds: float

    @cached_property
    def route(self) -> tuple[tuple[str, ...], ...]:
        """Groups of ROUTE without services that this kind does not use."""
        groups = (tuple(name for name in group if name in self.seconds) for group in ROUTE)
        return tuple(group for group in groups if group)


@dataclass(frozen=True)
class Arrival:
    """A request of a trace. `factor` multiplies the computing time of its kind."""

    time: float
    kind: Kind
    factor: float = 1.0


@dataclass(frozen=True)
class Trace:
    """Arrivals in order of time over `seconds`; `replicas` are ready at time 0.

    The first `lead_seconds` are excluded from the results, because a policy needs time to settle.
    """

    name: str
    arrivals: Sequence[Arrival]
    seconds: float
    replicas: Mapping[str, int]
    lead_seconds: float = 0.0


@dataclass(frozen=True)
class StageView:
    """Inputs of a policy. `replicas` counts replicas that load or accept requests; `busy_share` covers the last
    interval.

    `was_active` is whether an open request has needed the stage at any time since the last poll: the scaler also pushes
    activity between polls, as KEDA's push scalers do.
    """

    now: float
    load: StageLoad
    replicas: int
    busy_share: float
    was_active: bool


class Policy(Protocol):
    """Decides the number of replicas of one stage.

    It is polled every `interval` seconds, and when a request needs a stage without replicas.
    """

    interval: float

    def desired(self, view: StageView) -> int:
        """Return the desired number of replicas."""


@dataclass(eq=False, slots=True)
class Request:
    """A request in the fleet, in group `group` of its route; `left` stages of this group are unfinished."""

    arrival: Arrival
    group: int = -1
    left: int = 0
    ended: float | None = None
    served: list[str] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Replica:
    """A worker. It started to run `request` at the time `since`."""

    started: float
    is_ready: bool = False
    is_leaving: bool = False
    request: Request | None = None
    since: float = 0.0


class Paces:
    """Moving averages of seconds per step by shape, as the store records them for one stage."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float, int]] = {}

    def note(self, work: StageWork, seconds: float) -> None:
        """Record a finished request."""
        before_seconds, before_steps, _ = self._sums.get(work.shape, (0.0, 0.0, 0))
        self._sums[work.shape] = (
            seconds + _PACE_DECAY * before_seconds,
            work.steps + _PACE_DECAY * before_steps,
            work.tokens,
        )

    def seconds_of(self, work: StageWork) -> float | None:
        """Expected seconds of a request; None without data.

        The pace of an unknown shape is scaled by tokens from the shape with the nearest number of tokens.
        """
        if work.shape in self._sums:
            seconds, steps, _ = self._sums[work.shape]
            return work.steps * seconds / steps
        if not self._sums:
            return None
        seconds, steps, tokens = min(
            self._sums.values(), key=lambda each: max(work.tokens, each[2]) / min(work.tokens, each[2])
        )
        return work.steps * seconds / steps * work.tokens / tokens


class Stage:
    """The queue, replicas and measurements of one service."""

    def __init__(self, name: str, policy: Policy) -> None:
        self.name = name
        self.policy = policy
        self.queue: deque[Request] = deque()
        self.replicas: dict[Replica, None] = {}
        self.idle: deque[Replica] = deque()
        self.open_requests = 0
        self.gpu_seconds = 0.0
        self.paces = Paces()
        self._waiting: Counter[str] = Counter()
        self._kinds: dict[str, Kind] = {}
        self._busy_seconds = self._ready_seconds = 0.0
        self._polled = self._noted = self._active = 0.0
        self._ready = 0

    def enqueue(self, request: Request) -> None:
        """Add a request to the queue."""
        self.queue.append(request)
        kind = request.arrival.kind
        self._kinds[kind.name] = kind
        self._waiting[kind.name] += 1

    def begin(self, now: float) -> Replica:
        """Run the longest waiting request on the replica that has been idle longest."""
        replica, request = self.idle.popleft(), self.queue.popleft()
        self._waiting[request.arrival.kind.name] -= 1
        replica.request, replica.since = request, now
        return replica

    def end(self, replica: Replica, now: float) -> Request:
        """Handle a replica's finished request."""
        assert replica.request is not None
        request, replica.request = replica.request, None
        self._busy_seconds += now - max(replica.since, self._polled)
        self.open_requests -= 1
        self._active = now
        self.paces.note(request.arrival.kind.work[self.name], now - replica.since)
        if replica.is_leaving:
            self._remove(replica, now)
        else:
            self.idle.append(replica)
        return request

    def become_ready(self, replica: Replica, now: float) -> None:
        """Handle the end of a replica's loading."""
        self._note_ready_seconds(now)
        replica.is_ready = True
        self._ready += 1
        self.idle.append(replica)

    @property
    def kept(self) -> list[Replica]:
        """Replicas that load or accept requests, in order of their start."""
        return [each for each in self.replicas if not each.is_leaving]

    def scale_in(self, count: int, now: float, rng: random.Random) -> None:
        """Remove `count` replicas as Kubernetes does: replicas that are not ready first, then random ones."""
        kept = self.kept
        loading = [each for each in reversed(kept) if not each.is_ready]
        ready = [each for each in kept if each.is_ready]
        rng.shuffle(ready)
        for replica in [*loading, *ready][:count]:
            if replica.request is not None:
                replica.is_leaving = True
                continue
            if replica.is_ready:
                self.idle.remove(replica)
            self._remove(replica, now)

    def _remove(self, replica: Replica, now: float) -> None:
        self._note_ready_seconds(now)
        del self.replicas[replica]
        self._ready -= replica.is_ready
        self.gpu_seconds += now - replica.started

    def view(self, now: float) -> StageView:
        """Return the view for a poll, and start the next interval of `busy_share`."""
        self._note_ready_seconds(now)
        self._busy_seconds += sum(now - max(each.since, self._polled) for each in self.replicas if each.request)
        share = self._busy_seconds / self._ready_seconds if self._ready_seconds else float(bool(self.queue))
        self._busy_seconds = self._ready_seconds = 0.0
        was_active = self.open_requests > 0 or self._active > self._polled
        self._polled = now
        return StageView(now, self.load(now), len(self.kept), share, was_active)

    def gpu_seconds_until(self, now: float) -> float:
        """GPU seconds of all replicas until now."""
        return self.gpu_seconds + sum(now - each.started for each in self.replicas)

    def load(self, now: float) -> StageLoad:
        """The stage's load as the store would report it."""
        unmeasured = False

        def seconds_of(kind: Kind) -> float:
            nonlocal unmeasured
            seconds = self.paces.seconds_of(kind.work[self.name])
            unmeasured |= seconds is None
            return ASSUMED_SECONDS if seconds is None else seconds

        busy = [each for each in self.replicas if each.request is not None]
        running = sum(
            max(seconds_of(each.request.arrival.kind) - (now - each.since), 0.0) for each in busy if each.request
        )
        waiting = sum(count * seconds_of(self._kinds[name]) for name, count in self._waiting.items() if count)
        return StageLoad(len(busy), running, len(self.queue), waiting, self.open_requests, unmeasured)

    def _note_ready_seconds(self, now: float) -> None:
        self._ready_seconds += self._ready * (now - self._noted)
        self._noted = now


@dataclass(frozen=True)
class Outcome:
    """Result of a trace under a policy, without the lead: ended requests, and GPU seconds by stage."""

    requests: Sequence[Request]
    gpu_seconds: Mapping[str, float]

    @property
    def gpu_hours(self) -> float:
        """GPU hours of all replicas, including loading and draining."""
        return sum(self.gpu_seconds.values()) / 3_600

    @property
    def violation_minutes(self) -> int:
        """Arrival minutes in which more than 5% of the requests exceeded their SLO."""
        late: dict[int, list[bool]] = {}
        for request in self.requests:
            late.setdefault(int(request.arrival.time // 60), []).append(_is_late(request))
        return sum(sum(each) > 0.05 * len(each) for each in late.values())


def _is_late(request: Request) -> bool:
    assert request.ended is not None
    return request.ended - request.arrival.time > request.arrival.kind.slo_seconds


class Simulation:
    """Simulates one trace under one policy; every stage has its own policy instance."""

    def __init__(self, trace: Trace, policy: Callable[[], Policy], load_seconds: float, *, seed: int = 0) -> None:
        self._trace = trace
        self._load_seconds = load_seconds
        self._rng = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._open = len(trace.arrivals)
        self.now = 0.0
        self.requests = [Request(arrival) for arrival in trace.arrivals]
        names = dict.fromkeys(name for each in trace.arrivals for name in each.kind.seconds)
        self.stages = {name: Stage(name, policy()) for name in names}

    def run(self) -> Outcome:
        """Run until the trace is over and every request has ended. Raises RuntimeError if this takes too long."""
        for stage in self.stages.values():
            for _ in range(self._trace.replicas.get(stage.name, 0)):
                self._start(stage, 0.0)
            self._poll_again(stage)
        self._arrive(iter(self.requests))
        lead = self._trace.lead_seconds
        before = dict.fromkeys(self.stages, 0.0)
        if lead:
            self._at(lead, lambda: before.update(self._gpu_seconds()))
        while self._events and (self._open or self._events[0][0] <= self._trace.seconds):
            self.now, _, action = heapq.heappop(self._events)
            if self.now > _LONGEST * self._trace.seconds:
                raise RuntimeError(f"{self._open} requests of {self._trace.name} had not ended at {self.now:g} s")
            action()
        self.now = max(self.now, self._trace.seconds)
        spent = {name: seconds - before[name] for name, seconds in self._gpu_seconds().items()}
        return Outcome([each for each in self.requests if each.arrival.time >= lead], spent)

    def _gpu_seconds(self) -> dict[str, float]:
        return {name: stage.gpu_seconds_until(self.now) for name, stage in self.stages.items()}

    def _at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), action))

    def _arrive(self, requests: Iterator[Request]) -> None:
        """Schedule the next arrival, which schedules the following one."""
        request = next(requests, None)
        if request is None:
            return

        def arrive() -> None:
            for name in request.arrival.kind.seconds:
                stage = self.stages[name]
                stage.open_requests += 1
                if not stage.replicas:  # the scaler pushes activity before the next poll
                    self._poll(stage)
            self._proceed(request)
            self._arrive(requests)

        self._at(request.arrival.time, arrive)

    def _proceed(self, request: Request) -> None:
        """Move a request to its next group of stages, or end it."""
        if request.left:
            return
        request.group += 1
        route = request.arrival.kind.route
        if request.group == len(route):
            request.ended = self.now
            self._open -= 1
            return
        request.left = len(route[request.group])
        for name in route[request.group]:
            stage = self.stages[name]
            stage.enqueue(request)
            self._dispatch(stage)

    def _dispatch(self, stage: Stage) -> None:
        while stage.queue and stage.idle:
            replica = stage.begin(self.now)
            assert replica.request is not None
            arrival = replica.request.arrival
            seconds = arrival.kind.seconds[stage.name] * arrival.factor
            self._at(self.now + seconds, lambda replica=replica: self._finish(stage, replica))  # type: ignore[misc]

    def _finish(self, stage: Stage, replica: Replica) -> None:
        request = stage.end(replica, self.now)
        request.served.append(stage.name)
        request.left -= 1
        self._proceed(request)
        self._dispatch(stage)

    def _start(self, stage: Stage, load_seconds: float) -> None:
        replica = Replica(self.now)
        stage.replicas[replica] = None

        def ready() -> None:
            if replica in stage.replicas:
                stage.become_ready(replica, self.now)
                self._dispatch(stage)

        self._at(self.now + load_seconds, ready)

    def _poll_again(self, stage: Stage) -> None:
        def poll() -> None:
            self._poll(stage)
            self._poll_again(stage)

        self._at(self.now + stage.policy.interval, poll)

    def _poll(self, stage: Stage) -> None:
        """Poll the policy, and start or remove replicas."""
        view = stage.view(self.now)
        change = stage.policy.desired(view) - view.replicas
        for _ in range(change):
            self._start(stage, self._load_seconds)
        if change < 0:
            stage.scale_in(-change, self.now, self._rng)
