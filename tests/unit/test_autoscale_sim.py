"""The autoscaling simulator: completions, load times, draining, policies and traces."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import autoscale_sim
import pytest
from autoscale_sim import REPORTED_SEEDS, RIVALS, TUNED_SEEDS, Rival, Score, best_setting, compare
from bench_sim_fleet import Arrival, Kind, Paces, Policy, Simulation, StageView, Trace
from bench_sim_policies import (
    FIXED_UTILIZATION,
    GRID,
    OURS,
    WANTED,
    HpaPolicy,
    UtilizationPolicy,
    WantedSeconds,
    queue_length,
)
from bench_sim_traces import draw_trace, patterns
from hypothesis import given
from hypothesis import strategies as st

from common.scaling import StageLoad, StageWork
from services.cli.replica_policy import ReplicaBounds, ReplicaPolicy

ONE = Kind("one", {"denoising": StageWork(10, 100, "a")}, {"denoising": 10.0}, slo_seconds=15.0)


@dataclass
class FixedReplicas:
    """Policy that returns the given numbers of replicas, one for each poll; the last number repeats."""

    replicas: list[int]
    interval: float = 5.0
    views: list[StageView] = field(default_factory=list)

    def desired(self, view: StageView) -> int:
        self.views.append(view)
        return self.replicas.pop(0) if len(self.replicas) > 1 else self.replicas[0]


def simulation(times: list[float], policy: Callable[[], Policy], ready: int, load_seconds: float = 20.0) -> Simulation:
    trace = Trace("tiny", [Arrival(time, ONE) for time in times], 60.0, {"denoising": ready})
    return Simulation(trace, policy, load_seconds)


def ends(simulation: Simulation) -> list[float | None]:
    return [request.ended for request in simulation.run().requests]


def test_a_short_trace_matches_times_computed_by_hand() -> None:
    run = simulation([1.0, 2.0, 3.0], lambda: FixedReplicas([1]), ready=1)
    outcome = run.run()
    assert [request.ended for request in outcome.requests] == [11.0, 21.0, 31.0]
    assert outcome.violation_minutes == 1  # latencies of 19 and 28 s exceed the SLO of 15 s
    assert outcome.gpu_seconds == {"denoising": 60.0}
    assert outcome.gpu_hours == pytest.approx(1 / 60)


def test_a_started_replica_serves_after_its_load_time() -> None:
    # The second replica is started by the poll at 5 s, and ready at 25 s.
    assert ends(simulation([1.0, 2.0, 3.0, 4.0], lambda: FixedReplicas([2]), ready=1, load_seconds=20.0)) == [
        11,
        21,
        31,
        35,
    ]
    assert ends(simulation([1.0, 2.0, 3.0, 4.0], lambda: FixedReplicas([2]), ready=1, load_seconds=1.0)) == [
        11,
        16,
        21,
        26,
    ]


def test_loading_and_idle_replicas_cost_gpu_seconds() -> None:
    run = simulation([4.0], lambda: FixedReplicas([2, 2, 0, 0, 0, 0]), ready=1, load_seconds=20.0)
    # One replica is busy from 4 to 14 s, the other loads from 5 s; both are scaled in at 15 s.
    assert run.run().gpu_seconds == {"denoising": 15.0 + 10.0}


def test_scaling_in_never_interrupts_running_work() -> None:
    run = simulation([1.0, 4.0], lambda: FixedReplicas([0, 0, 0, 1]), ready=2)
    outcome = run.run()
    assert [request.ended for request in outcome.requests] == [11.0, 14.0]
    assert outcome.gpu_seconds["denoising"] == pytest.approx(11.0 + 14.0 + (60.0 - 20.0))


def test_a_loading_replica_that_is_scaled_in_never_serves() -> None:
    assert ends(simulation([1.0, 2.0, 3.0], lambda: FixedReplicas([2, 1]), ready=1, load_seconds=7.0)) == [11, 21, 31]


def test_the_first_request_starts_a_replica_at_once() -> None:
    run = simulation([7.0], lambda: WantedSeconds(30.0, 0.0, 60.0).policy(least=0), ready=0, load_seconds=20.0)
    assert ends(run) == [37.0]


def test_a_view_reports_the_load_of_the_stage() -> None:
    policy = FixedReplicas([1], interval=6.0)
    simulation([1.0, 2.0, 3.0], lambda: policy, ready=1).run()
    first, second = policy.views[:2]
    assert (first.load.workers_held, first.load.waiting_claims, first.load.open_requests) == (1, 2, 3)
    assert first.load.unmeasured
    assert first.load.queued_seconds == 25.0  # three requests of 10 assumed seconds, minus 5 elapsed seconds
    assert first.busy_share == pytest.approx(5 / 6)
    assert (second.load.workers_held, second.load.waiting_claims, second.load.open_requests) == (1, 1, 2)
    assert not second.load.unmeasured
    assert second.load.running_seconds == pytest.approx(9.0)
    assert second.load.waiting_seconds == pytest.approx(10.0)


def test_paces_use_the_shape_with_the_nearest_token_count() -> None:
    paces = Paces()
    assert paces.seconds_of(StageWork(10, 100, "a")) is None
    paces.note(StageWork(10, 100, "a"), 20.0)
    paces.note(StageWork(10, 10_000, "b"), 500.0)
    assert paces.seconds_of(StageWork(5, 100, "a")) == pytest.approx(10.0)
    assert paces.seconds_of(StageWork(10, 200, "c")) == pytest.approx(40.0)


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("trace", patterns())
def test_every_request_is_served_once_at_every_stage(name: str, trace: str) -> None:
    drawn = draw_trace(trace, patterns()[trace], seed=3)
    few = Trace(drawn.name, drawn.arrivals[:400], 2_000.0, drawn.replicas)
    outcome = Simulation(few, next(iter(GRID[name].values())), 30.0).run()
    assert len(outcome.requests) == 400
    for request in outcome.requests:
        assert sorted(request.served) == sorted(request.arrival.kind.seconds)
        assert request.served.index("denoising") == len(request.served) - 2
        computing = request.arrival.factor * sum(request.arrival.kind.seconds.values())
        assert request.ended is not None
        assert request.ended - request.arrival.time >= computing - 1e-6


def test_traces_and_scores_are_deterministic() -> None:
    drawn = draw_trace("bursts of 8 times", patterns()["bursts of 8 times"], seed=3)
    scores = [autoscale_sim.score(drawn, WantedSeconds(15.0, 0.0, 60.0).policy, 30.0) for _ in range(2)]
    assert scores[0] == scores[1]
    assert drawn == draw_trace("bursts of 8 times", patterns()["bursts of 8 times"], seed=3)


def test_the_simulator_computes_demand_with_production_code(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw_trace("step to 4 times", patterns()["step to 4 times"], seed=3)

    def gpu_hours() -> float:
        return autoscale_sim.score(drawn, WantedSeconds(15.0, 0.0, 60.0).policy, 30.0).gpu_hours

    before = gpu_hours()
    original = StageLoad.wanted_seconds
    monkeypatch.setattr(StageLoad, "wanted_seconds", lambda load, target: 2 * original(load, target))
    assert gpu_hours() > 1.2 * before


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(0, 900), st.floats(1, 90)), max_size=30),
    st.sampled_from(sorted(WANTED)),
    st.integers(0, 2),
)
def test_simulated_decisions_equal_those_of_replica_policy(
    polls: list[tuple[int, int, float, float]], name: str, least: int
) -> None:
    """The simulated policy returns ReplicaPolicy's decision, limited by the HPA's bound on scaling out."""
    setting, now, replicas = WANTED[name], 0.0, 3
    simulated = setting.policy(least)
    policy = ReplicaPolicy(ReplicaBounds(least, 64, setting.window), lambda: now, setting.headroom)
    for held, claims, waiting, passed in polls:
        now += passed
        polled = view(replicas, held=held, claims=claims, waiting=waiting, now=now)
        demand = polled.load.wanted_seconds(setting.target) / setting.target
        decided = policy.decide(replicas, is_active=held + claims > 0, demand=demand)
        assert simulated.desired(polled) == min(decided, max(2 * replicas, replicas + 4))
        replicas = min(decided, max(2 * replicas, replicas + 4))


def view(replicas: int, *, held: int = 0, claims: int = 0, waiting: float = 0.0, now: float = 0.0) -> StageView:
    return StageView(now, StageLoad(held, 0.0, claims, waiting, held + claims), replicas, 0.0, held + claims > 0)


def test_the_hpa_rounds_up_within_its_tolerance() -> None:
    policy = WantedSeconds(30.0, 0.0, 0.0).policy()
    assert policy.desired(view(10, held=10, claims=1, waiting=27.0)) == 10  # 9% above the target is tolerated
    assert policy.desired(view(10, held=10, claims=2, waiting=60.0)) == 12
    assert policy.desired(view(2, held=2, claims=50, waiting=3_000.0)) == 6  # at most four more replicas per poll
    assert policy.desired(view(10, held=3, now=1.0)) == 3


def test_the_hpa_scales_in_after_its_stabilization_window() -> None:
    policy = queue_length(0.0, 60.0)
    assert policy.desired(view(8, held=8, now=0.0)) == 8
    assert policy.desired(view(8, held=2, now=45.0)) == 8
    assert policy.desired(view(8, held=2, now=61.0)) == 2


def test_only_an_unused_stage_scales_to_zero() -> None:
    for least, after in ((0, 0), (1, 1)):
        policy = HpaPolicy(lambda load: float(load.open_requests), 0.0, 60.0, least)
        load = StageLoad(0, 0.0, 0, 0.0, 0)
        assert policy.desired(StageView(0.0, load, 3, 0.0, was_active=True)) == 3
        assert policy.desired(StageView(59.0, load, 3, 0.0, was_active=False)) == 3
        assert policy.desired(StageView(60.0, load, 1, 0.0, was_active=False)) == after


def test_a_request_between_two_polls_counts_as_activity() -> None:
    quick = Kind("quick", {"denoising": StageWork(1, 100, "a")}, {"denoising": 1.0}, slo_seconds=15.0)
    policy = FixedReplicas([1])
    Simulation(Trace("tiny", [Arrival(6.0, quick)], 60.0, {"denoising": 1}), lambda: policy, 20.0).run()
    assert [each.was_active for each in policy.views[:4]] == [False, True, False, False]
    assert not any(each.load.is_active for each in policy.views)


def test_fixed_utilization_scales_at_80_and_20_percent_with_a_cooldown_of_30_s() -> None:
    policy = GRID["utilization"][FIXED_UTILIZATION]()
    assert isinstance(policy, UtilizationPolicy)
    assert policy.interval == 5.0
    load = StageLoad(0, 0.0, 0, 0.0, 0)

    def desired(now: float, replicas: int, busy_share: float) -> int:
        return policy.desired(StageView(now, load, replicas, busy_share, was_active=True))

    assert desired(0.0, 4, 0.8) == 4  # not above 80%
    assert desired(5.0, 4, 0.81) == 5  # scale out by one
    assert desired(30.0, 5, 0.9) == 5  # 25 s later: the cooldown
    assert desired(35.0, 5, 0.9) == 6
    assert desired(65.0, 6, 0.5) == 6
    assert desired(70.0, 6, 0.2) == 6  # not below 20%
    assert desired(75.0, 6, 0.19) == 5  # scale in by one
    assert desired(100.0, 5, 0.1) == 5
    assert desired(105.0, 5, 0.1) == 4
    assert desired(140.0, 1, 0.0) == 1  # never zero: zero replicas have no utilization


def test_fixed_utilization_is_reported_beside_the_tuned_policies() -> None:
    assert [(each.policy, each.setting) for each in RIVALS] == [
        ("queue length", None),
        ("utilization", FIXED_UTILIZATION),
        ("utilization", None),
    ]


def test_tuning_and_report_use_disjoint_seeds() -> None:
    assert not set(TUNED_SEEDS) & set(REPORTED_SEEDS)


@dataclass
class FixedTotals:
    """Total scores in place of simulation results, by policy and setting."""

    scores: dict[str, dict[str, Score]]

    def totals(self, name: str, _: float) -> dict[str, Score]:
        return self.scores[name]


def test_our_setting_is_chosen_within_the_gpu_hours_of_the_rival() -> None:
    ours = {"dear": Score(0, 9.0), "fair": Score(2, 5.0), "cheap": Score(4, 4.0)}
    utilization = {FIXED_UTILIZATION: Score(8, 5.0), "better": Score(1, 8.0), "none fit": Score(3, 1.0)}
    tuned = FixedTotals({OURS: ours, "utilization": utilization})
    fixed = compare(tuned, Rival("fixed", "utilization", FIXED_UTILIZATION), 60.0)
    assert (fixed.setting, fixed.ours) == (FIXED_UTILIZATION, "fair")
    free = compare(tuned, Rival("tuned", "utilization"), 60.0)
    assert (free.setting, free.ours) == ("better", "fair")
    assert compare(tuned, Rival("least", "utilization", "none fit"), 60.0).ours is None


def test_grids_have_equal_sizes_and_the_best_setting_minimizes_violation_minutes_then_gpu_hours() -> None:
    assert len({len(settings) for settings in GRID.values()}) == 1
    settings = {"a": Score(3, 1.0), "b": Score(1, 9.0), "c": Score(1, 8.0)}
    assert best_setting(settings) == "c"
    assert best_setting(settings, most_gpu_hours=5.0) == "a"
    assert best_setting(settings, most_gpu_hours=0.5) is None


def test_traces_have_the_rates_of_their_patterns() -> None:
    pattern = patterns()["step to 4 times"]
    drawn = draw_trace("step to 4 times", pattern, seed=random.randrange(100))
    late = sum(1 for each in drawn.arrivals if each.time >= drawn.lead_seconds + 600.0)
    assert late == pytest.approx(3.0 * 1_800, rel=0.1)
