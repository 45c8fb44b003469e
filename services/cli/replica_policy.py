"""Computes the number of replicas of a service with the algorithms of KEDA and of Kubernetes' HPA.

KEDA scales between 0 and 1 replica, based on activity. The HPA scales between 1 and the maximum number of replicas,
based on the metric. This module omits the HPA's default limit on scale-out (100% or 4 pods in 15 s), because workers on
one host start in seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from common.errors import InvalidInput

TOLERANCE = 0.1
"""Relative deviation from the target up to which the number of replicas does not change: the HPA's default."""


@dataclass(frozen=True)
class ReplicaBounds:
    """Replica bounds of one service. `idle_seconds` is KEDA's cooldown and the HPA's scale-in stabilization window."""

    least: int
    most: int
    idle_seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most or self.most < 1:
            raise InvalidInput(
                f"max_replicas: {self.most} is not at least 1 and at least the minimum of {self.least}; "
                f"{max(self.least, 1)} works",
                field="max_replicas",
            )


@dataclass(frozen=True)
class _Recommendation:
    """A number of replicas recommended by the metric, and the time of the recommendation in seconds."""

    time: float
    replicas: int


def with_headroom(demand: float, headroom: float) -> float:
    """Add spare replicas to the demand: `headroom` times the square root of the demand.

    The standard deviation of Poisson arrivals is the square root of their mean, so larger stages need a smaller
    fraction of spare replicas.
    """
    return demand + headroom * math.sqrt(demand)


@dataclass
class ReplicaPolicy:
    """Decides the number of replicas of one service. `clock` is monotonic, in seconds.

    `headroom` is added to the demand, as a formula in KEDA's scalingModifiers does; see with_headroom().
    """

    bounds: ReplicaBounds
    clock: Callable[[], float] = time.monotonic
    headroom: float = 0.0
    _active_at: float | None = None
    _recommendations: list[_Recommendation] = field(default_factory=list)

    def decide(self, current: int, *, is_active: bool, demand: float | None) -> int:
        """The number of replicas to run, given the `current` number.

        `demand` is the metric divided by its target per replica; None if the metric is unknown. Without `demand`, the
        number changes only by activity (from or to zero) and by the bounds.
        """
        now = self.clock()
        if is_active or self._active_at is None:
            self._active_at = now
        if current == 0:
            self._recommendations.clear()
            return max(self.bounds.least, 1 if is_active else 0)
        if not is_active and self.bounds.least == 0 and now - self._active_at >= self.bounds.idle_seconds:
            return 0
        return self._stabilized(current, self._recommended(current, demand), now)

    def _recommended(self, current: int, demand: float | None) -> int:
        """The number of replicas for the demand with headroom, within the bounds and at least 1."""
        return min(max(self._wanted(current, demand), self.bounds.least, 1), self.bounds.most)

    def _wanted(self, current: int, demand: float | None) -> int:
        if demand is None:
            return current
        wanted = with_headroom(demand, self.headroom)
        # Rounded to thousandths as in Kubernetes, so that a floating-point error adds no replica.
        return current if round(abs(wanted / current - 1), 3) <= TOLERANCE else _ceil(wanted)

    def _stabilized(self, current: int, recommended: int, now: float) -> int:
        """The recommendation. A scale-in uses the largest recommendation within the stabilization window."""
        if not self._recommendations:
            self._recommendations.append(_Recommendation(now, min(current, self.bounds.most)))
        oldest = now - self.bounds.idle_seconds
        self._recommendations = [each for each in self._recommendations if each.time > oldest]
        self._recommendations.append(_Recommendation(now, recommended))
        largest = max(each.replicas for each in self._recommendations)
        return recommended if recommended >= current else min(current, largest)


def _ceil(demand: float) -> int:
    return math.ceil(round(demand, 3))
