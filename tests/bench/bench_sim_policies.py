"""Autoscaling policies for the simulator.

The fleet's policy and the queue-length policy set replicas through KEDA and the HPA, each with its own metric. The
utilization policy adds and removes replicas at two thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from bench_sim_fleet import Policy, StageView

from common.scaling import StageLoad
from services.cli.replica_policy import ReplicaBounds, ReplicaPolicy

MAX_REPLICAS = 64
HPA_SECONDS = 15.0  # interval between polls of the HPA
HPA_PODS = 4  # the HPA adds at most this number of replicas or 100% per poll, whichever is larger
UTILIZATION_SECONDS = 5.0
UTILIZATION_COOLDOWN = 30.0


@dataclass
class HpaPolicy:
    """KEDA and the HPA, simulated by ReplicaPolicy, the code of `fleet up --autoscale`.

    `demand` computes the demand for replicas from the load. This class adds the HPA's default scale-out limit. `window`
    is the stabilization window for scale-in in seconds and, with `least` 0, KEDA's cooldown period.
    """

    demand: Callable[[StageLoad], float]
    headroom: float
    window: float
    least: int = 1
    interval: float = HPA_SECONDS

    def __post_init__(self) -> None:
        self._now = 0.0
        bounds = ReplicaBounds(self.least, MAX_REPLICAS, self.window)
        self._policy = ReplicaPolicy(bounds, clock=lambda: self._now, headroom=self.headroom)

    def desired(self, view: StageView) -> int:
        """Number of replicas that the HPA would set."""
        self._now = view.now
        wanted = self._policy.decide(view.replicas, is_active=view.was_active, demand=self.demand(view.load))
        return min(wanted, view.replicas + max(view.replicas, HPA_PODS))


@dataclass
class UtilizationPolicy:
    """Adds replicas if the busy fraction exceeds `above`, and removes a replica if it is below `below`.

    After a change, it waits for a cooldown.
    """

    above: float
    below: float
    growth: float
    """Fraction of the replicas to add, at least one."""
    interval: float = UTILIZATION_SECONDS
    _changed: float = -UTILIZATION_COOLDOWN

    def desired(self, view: StageView) -> int:
        """Desired replicas: at least one, as a stage without replicas has no utilization."""
        replicas = max(view.replicas, 1)
        if view.now - self._changed >= UTILIZATION_COOLDOWN:
            if view.busy_share > self.above:
                replicas = min(replicas + max(1, math.ceil(self.growth * replicas)), MAX_REPLICAS)
            elif view.busy_share < self.below:
                replicas = max(replicas - 1, 1)
        if replicas != view.replicas:
            self._changed = view.now
        return replicas


@dataclass(frozen=True)
class WantedSeconds:
    """A setting of the fleet's policy; its demand is the metric that the coordinators report to KEDA.

    `target` is the trigger's targetSeconds, `headroom` the argument of with_headroom(), and `window` the HPA's
    stabilizationWindowSeconds.
    """

    target: float
    headroom: float
    window: float

    def policy(self, least: int = 1) -> Policy:
        """A new policy with a minimum of `least` replicas."""
        return HpaPolicy(lambda load: load.wanted_seconds(self.target) / self.target, self.headroom, self.window, least)

    def __str__(self) -> str:
        return f"targetSeconds {self.target:g}, headroom {self.headroom:g}, window {self.window:g} s"


def queue_length(headroom: float, window: float) -> Policy:
    """The HPA on the number of a stage's waiting and running requests.

    Without the running requests, busy replicas would be removed.
    """
    return HpaPolicy(lambda load: float(load.workers_held + load.waiting_claims), headroom, window)


OURS = "wanted seconds"
_GROWTHS = {0.0: "one", 0.5: "50%", 1.0: "100%"}  # names of UtilizationPolicy.growth, before "more"

FIXED_UTILIZATION = "80% to 20%, one more"
TARGET_SECONDS = (5.0, 30.0, 120.0)
HEADROOMS = (0.0, 1.0, 2.0, 4.0)
WINDOWS = (60.0, 120.0, 300.0)

WANTED: Mapping[str, WantedSeconds] = {
    str(setting): setting
    for setting in (
        WantedSeconds(target, headroom, window)
        for target in TARGET_SECONDS
        for headroom in HEADROOMS
        for window in WINDOWS
    )
}

GRID: Mapping[str, Mapping[str, Callable[[], Policy]]] = {
    OURS: {name: setting.policy for name, setting in WANTED.items()},
    "queue length": {
        f"headroom {headroom:g}, window {window:g} s": partial(queue_length, headroom, window)
        for headroom in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
        for window in WINDOWS
    },
    "utilization": {
        f"{above:.0%} to {below:.0%}, {_GROWTHS[growth]} more": partial(UtilizationPolicy, above, below, growth)
        for above in (0.9, 0.8, 0.65, 0.5)
        for below in (0.05, 0.1, 0.2)
        for growth in _GROWTHS
    },
}
"""Policies with their settings; every grid has the same size."""
