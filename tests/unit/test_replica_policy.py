"""Decisions of the replica policy: worked examples of KEDA's and the HPA's rules, and properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInput
from common.scaling import StageLoad
from services.cli.replica_policy import ReplicaBounds, ReplicaPolicy, with_headroom


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_policy(least: int = 0, most: int = 8, idle_seconds: float = 30.0) -> tuple[ReplicaPolicy, Clock]:
    clock = Clock()
    return ReplicaPolicy(ReplicaBounds(least, most, idle_seconds), clock), clock


def test_the_first_request_starts_one_worker_whatever_the_metric() -> None:
    policy, _ = make_policy()
    assert policy.decide(0, is_active=False, demand=7.0) == 0
    assert policy.decide(0, is_active=True, demand=None) == 1
    assert policy.decide(0, is_active=True, demand=7.0) == 1


def test_once_a_worker_runs_the_metric_decides_the_number_of_workers() -> None:
    policy, _ = make_policy()
    assert policy.decide(1, is_active=True, demand=2.4) == 3
    assert policy.decide(3, is_active=True, demand=6.01) == 7
    assert policy.decide(7, is_active=True, demand=25.0) == 8


def test_a_demand_within_a_tenth_of_the_target_changes_nothing() -> None:
    policy, _ = make_policy(most=40)
    assert policy.decide(10, is_active=True, demand=11.0) == 10
    assert policy.decide(10, is_active=True, demand=11.02) == 12
    assert make_policy(idle_seconds=0)[0].decide(8, is_active=True, demand=7.2) == 8
    assert make_policy(idle_seconds=0)[0].decide(8, is_active=True, demand=6.9) == 7


def test_a_rounding_error_starts_no_worker() -> None:
    assert make_policy()[0].decide(1, is_active=True, demand=3 + 1e-9) == 3


def test_headroom_is_a_multiple_of_the_square_root_of_the_demand() -> None:
    assert with_headroom(0.0, 2.0) == 0.0
    assert with_headroom(1.0, 2.0) == 3.0
    assert with_headroom(16.0, 0.5) == 18.0
    assert with_headroom(7.5, 0.0) == 7.5


def test_headroom_adds_workers_within_the_bounds() -> None:
    clock = Clock()
    policy = ReplicaPolicy(ReplicaBounds(0, 20, 30.0), clock, headroom=2.0)
    assert policy.decide(0, is_active=True, demand=9.0) == 1
    assert policy.decide(1, is_active=True, demand=9.0) == 15
    assert policy.decide(15, is_active=True, demand=16.0) == 20
    assert policy.decide(20, is_active=True, demand=None) == 20
    clock.now += 30
    assert policy.decide(20, is_active=False, demand=0.0) == 0


@given(st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 8))
def test_headroom_preserves_the_order_of_demands(one: float, other: float, headroom: float) -> None:
    less, more = sorted((one, other))
    assert less <= with_headroom(less, headroom) <= with_headroom(more, headroom)
    assert with_headroom(more, headroom) - more == pytest.approx(headroom * math.sqrt(more), abs=1e-6)


def test_scale_in_takes_the_largest_recommendation_of_the_window() -> None:
    policy, clock = make_policy(idle_seconds=30.0)
    assert policy.decide(6, is_active=True, demand=6.0) == 6
    clock.now += 10
    assert policy.decide(6, is_active=True, demand=4.0) == 6
    clock.now += 19
    assert policy.decide(6, is_active=True, demand=2.0) == 6
    clock.now += 1  # 30 s after the recommendation of 6
    assert policy.decide(6, is_active=True, demand=2.0) == 4
    clock.now += 10  # 30 s after the recommendation of 4
    assert policy.decide(4, is_active=True, demand=2.0) == 2


def test_scale_in_waits_for_a_full_window_after_the_start() -> None:
    policy, clock = make_policy(idle_seconds=30.0)
    assert policy.decide(5, is_active=True, demand=1.0) == 5
    clock.now += 30
    assert policy.decide(5, is_active=True, demand=1.0) == 1


def test_scale_to_zero_waits_for_the_cooldown_after_the_last_activity() -> None:
    policy, clock = make_policy(idle_seconds=30.0)
    assert policy.decide(1, is_active=True, demand=1.0) == 1
    clock.now += 29
    assert policy.decide(1, is_active=False, demand=0.0) == 1
    assert policy.decide(1, is_active=True, demand=1.0) == 1
    clock.now += 29.5
    assert policy.decide(1, is_active=False, demand=0.0) == 1
    clock.now += 0.5
    assert policy.decide(1, is_active=False, demand=0.0) == 0


def test_the_minimum_number_of_workers_always_runs() -> None:
    policy, clock = make_policy(least=2, idle_seconds=5.0)
    assert policy.decide(0, is_active=False, demand=0.0) == 2
    assert policy.decide(2, is_active=False, demand=0.0) == 2
    clock.now += 100
    assert policy.decide(2, is_active=False, demand=0.0) == 2
    assert policy.decide(1, is_active=False, demand=0.0) == 2


def test_without_a_metric_the_number_of_workers_stays() -> None:
    policy, clock = make_policy(idle_seconds=5.0)
    assert policy.decide(3, is_active=True, demand=None) == 3
    clock.now += 100
    assert policy.decide(3, is_active=True, demand=None) == 3


def test_workers_above_the_maximum_are_ended_at_once() -> None:
    assert make_policy(most=4)[0].decide(9, is_active=True, demand=9.0) == 4


@pytest.mark.parametrize(("least", "most"), [(0, 0), (3, 2), (-1, 2)])
def test_invalid_bounds_are_refused(least: int, most: int) -> None:
    with pytest.raises(InvalidInput, match="max_replicas"):
        ReplicaBounds(least, most, 1.0)


LOADS = st.builds(
    StageLoad,
    workers_held=st.integers(0, 12),
    running_seconds=st.floats(0, 1e4),
    waiting_claims=st.integers(0, 40),
    waiting_seconds=st.floats(0, 1e5),
    open_requests=st.integers(1, 60) | st.just(0),
)


@given(
    st.lists(st.tuples(LOADS, st.floats(0, 40)), max_size=30),
    st.integers(0, 4),
    st.integers(4, 10),
    st.floats(0, 60),
    st.floats(0.5, 300),
)
def test_decisions_respect_the_bounds_for_any_sequence_of_loads(
    polls: list[tuple[StageLoad, float]], least: int, most: int, idle_seconds: float, target: float
) -> None:
    """Decisions end no held worker while requests are open. They fall to 0 only after `idle_seconds` of inactivity."""
    policy, clock = make_policy(least, most, idle_seconds)
    current, active_at = policy.decide(0, is_active=False, demand=0.0), clock.now
    for load, passed in polls:
        clock.now += passed
        active_at = clock.now if load.is_active else active_at
        decided = policy.decide(current, is_active=load.is_active, demand=load.wanted_seconds(target) / target)
        assert least <= decided <= most
        if load.is_active and current:
            assert decided >= min(load.workers_held, current)
        if load.is_active:
            assert decided >= 1
        elif decided == 0 and current:
            assert clock.now - active_at >= idle_seconds
        current = decided


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 40), st.floats(0, 40))
def test_more_demand_never_means_fewer_workers(current: int, most: int, one: float, other: float) -> None:
    less, more = sorted((one, other))
    decided = [
        make_policy(most=most, idle_seconds=0.0)[0].decide(current, is_active=True, demand=demand)
        for demand in (less, more)
    ]
    assert decided[0] <= decided[1]
