"""Autoscaling policies for the simulator: the fleet's scaler value and a queue's length through KEDA and the HPA, and a
threshold of utilisation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from bench_sim_fleet import Policy, StageView

from common.scaling import StageLoad

MAX_REPLICAS = 64
HPA_SECONDS = 15.0  # between two polls of the HPA
TOLERANCE = 0.1  # of the metric around its target within which the HPA leaves the replicas alone
ZERO_SECONDS = 300.0  # without an open request until KEDA scales to zero (its cooldownPeriod)
UTILISATION_SECONDS = 5.0
UTILISATION_COOLDOWN = 30.0


@dataclass
class HpaPolicy:
    """KEDA and the HPA on a metric of type AverageValue: ceil(metric / target) replicas, at least one while active.

    More at once (at most doubled, or 4 more, in a poll), fewer only after nothing else was recommended for `window`
    seconds, none after ZERO_SECONDS without an open request.
    """

    metric: Callable[[StageLoad], float]
    target: float
    window: float
    interval: float = HPA_SECONDS
    _recommended: deque[tuple[float, int]] = field(default_factory=deque)

    def desired(self, view: StageView) -> int:
        """What the HPA would set."""
        if view.inactive_seconds >= ZERO_SECONDS:
            self._recommended.clear()
            return 0
        if not view.replicas:
            return int(view.load.is_active)
        wanted = min(max(self._wanted(view), 1), MAX_REPLICAS)
        self._recommended.append((view.now, wanted))
        while self._recommended[0][0] < view.now - self.window:
            self._recommended.popleft()
        if wanted > view.replicas:
            return min(wanted, max(2 * view.replicas, view.replicas + 4))
        return min(view.replicas, max(replicas for _, replicas in self._recommended))

    def _wanted(self, view: StageView) -> int:
        value = self.metric(view.load)
        if abs(value / (self.target * view.replicas) - 1) <= TOLERANCE:
            return view.replicas
        return math.ceil(value / self.target - 1e-9)


@dataclass
class UtilisationPolicy:
    """More replicas above a share of busy time, one fewer below another, and no change during a cooldown."""

    above: float
    below: float
    growth: float
    """Share of the replicas that is added, at least one."""
    interval: float = UTILISATION_SECONDS
    _changed: float = -UTILISATION_COOLDOWN

    def desired(self, view: StageView) -> int:
        """What it would set: at least one, as nothing is busy where nothing runs."""
        replicas = max(view.replicas, 1)
        if view.now - self._changed >= UTILISATION_COOLDOWN:
            if view.busy_share > self.above:
                replicas = min(replicas + max(1, math.ceil(self.growth * replicas)), MAX_REPLICAS)
            elif view.busy_share < self.below:
                replicas = max(replicas - 1, 1)
        if replicas != view.replicas:
            self._changed = view.now
        return replicas


def wanted_seconds(target: float, headroom: float, window: float) -> Policy:
    """The fleet's policy, with the code that coordinators answer KEDA with.

    `headroom` multiplies the value, as a `formula` of KEDA's scalingModifiers does: 1.5 keeps a third idle.
    """
    return HpaPolicy(lambda load: headroom * load.wanted_seconds(target), target, window)


def queue_length(requests: float, window: float) -> Policy:
    """The HPA on the requests of a stage for each replica. Running ones count, or they would be scaled away."""
    return HpaPolicy(lambda load: float(load.workers_held + load.waiting_claims), requests, window)


TARGET_SECONDS = (15.0, 60.0)
HEADROOMS = (1.0, 1.5, 2.0, 3.0)

GRID: Mapping[str, Mapping[str, Callable[[], Policy]]] = {
    "wanted seconds": {
        f"targetSeconds {target:g}, headroom {headroom:g}, window {window:g} s": partial(
            wanted_seconds, target, headroom, window
        )
        for target in TARGET_SECONDS
        for headroom in HEADROOMS
        for window in (120.0, 600.0)
    },
    "queue length": {
        f"{1 / headroom:.2g} a replica, window {window:g} s": partial(queue_length, 1 / headroom, window)
        for headroom in HEADROOMS
        for window in (60.0, 120.0, 300.0, 600.0)
    },
    "utilisation": {
        f"{above:.0%} to {below:.0%}, {'50% more' if growth else 'one more'}": partial(
            UtilisationPolicy, above, below, growth
        )
        for above in (0.8, 0.7, 0.6, 0.5)
        for below in (0.2, 0.4)
        for growth in (0.0, 0.5)
    },
}
"""Policies, each with as many settings to choose from. The first of utilisation is 80% to 20%."""
