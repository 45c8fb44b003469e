"""The metric that autoscalers divide by the target seconds of one replica."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from common.scaling import StageLoad

LOADS = st.builds(
    StageLoad,
    workers_held=st.integers(0, 50),
    running_seconds=st.floats(0, 1e5),
    waiting_claims=st.integers(0, 500),
    waiting_seconds=st.floats(0, 1e6),
    open_requests=st.integers(0, 1_000),
)


def load(held: int = 0, claims: int = 0, waiting: float = 0.0, running: float = 0.0) -> StageLoad:
    return StageLoad(held, running, claims, waiting, held + claims)


def test_one_long_request_needs_one_replica() -> None:
    assert load(claims=1, waiting=900.0).wanted_seconds(30.0) == 30.0


def test_many_short_requests_share_replicas() -> None:
    assert load(claims=20, waiting=60.0).wanted_seconds(30.0) == 60.0


def test_a_worker_that_runs_a_request_counts_as_one_replica() -> None:
    assert load(held=3, running=1.0).wanted_seconds(30.0) == 90.0
    assert load(held=2, claims=2, waiting=45.0, running=500.0).wanted_seconds(30.0) == 105.0


def test_queued_seconds_are_the_sum_of_waiting_and_running_seconds() -> None:
    assert load(held=1, claims=1, waiting=5.0, running=2.5).queued_seconds == 7.5


@given(LOADS, st.floats(0.5, 600))
def test_replicas_are_never_fewer_than_held_workers_nor_more_than_requests(load: StageLoad, target: float) -> None:
    replicas = math.ceil(load.wanted_seconds(target) / target - 1e-9)
    assert load.workers_held <= replicas <= load.workers_held + load.waiting_claims
