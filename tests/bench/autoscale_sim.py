"""Simulation of stage autoscaling: the fleet's policy against queue length and utilization.

The fleet's policy is the production code, common.scaling and services.cli.replica_policy; service times are committed
measurements. There are five traces. Each other policy, except one with a fixed setting, is tuned per load time by a
grid search on the arrivals of TUNED_SEEDS; all grids have the same size. The objective is the fewest minutes over the
SLO in all traces, then the fewest GPU hours. The fleet's policy is tuned in the same way, among the settings that need
no more GPU hours than the other policy. Results use the arrivals of REPORTED_SEEDS.

Run it with: python tests/bench/autoscale_sim.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_report import print_table, say
from bench_sim_fleet import Policy, Simulation, Trace
from bench_sim_policies import FIXED_UTILIZATION, GRID, HEADROOMS, OURS, WANTED, WantedSeconds
from bench_sim_traces import draw_trace, patterns

LOAD_SECONDS = (10.0, 60.0, 300.0)
TUNED_SEEDS = (1, 2, 3)
REPORTED_SEEDS = (11, 12, 13, 14, 15)
ALL = "all five"


@dataclass(frozen=True)
class Score:
    """Minutes over the SLO, and GPU hours; compared in this order."""

    minutes: float
    gpu_hours: float

    def __add__(self, other: Score) -> Score:
        return Score(self.minutes + other.minutes, self.gpu_hours + other.gpu_hours)

    def __truediv__(self, count: int) -> Score:
        return Score(self.minutes / count, self.gpu_hours / count)

    def __str__(self) -> str:
        return f"{self.minutes:.1f} / {self.gpu_hours:.1f}"

    @property
    def key(self) -> tuple[float, float]:
        """Sort key: minutes, then GPU hours."""
        return self.minutes, self.gpu_hours


Scores = Mapping[str, Score]
"""Mean score over seeds, by trace."""


def score(trace: Trace, policy: Callable[[], Policy], load_seconds: float) -> Score:
    """Run one simulation; returns its score."""
    outcome = Simulation(trace, policy, load_seconds).run()
    return Score(outcome.violation_minutes, outcome.gpu_hours)


def total(scores: Iterable[Score]) -> Score:
    """Sum scores over traces or seeds."""
    return sum(scores, Score(0.0, 0.0))


@dataclass
class Bench:
    """Simulations of traces by name and seed; results are cached by setting."""

    seeds: Sequence[int]
    _known: dict[tuple[str, str, float], Scores] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.traces: Mapping[str, Sequence[Trace]] = {
            name: [draw_trace(name, pattern, seed) for seed in self.seeds] for name, pattern in patterns().items()
        }

    def mean_scores(self, policy: Callable[[], Policy], load_seconds: float) -> Scores:
        """Mean score over seeds, for each trace."""
        return {
            name: total(score(trace, policy, load_seconds) for trace in traces) / len(traces)
            for name, traces in self.traces.items()
        }

    def of(self, name: str, setting: str, load_seconds: float) -> Scores:
        """Scores of one setting of the policy `name` in GRID."""
        key = (name, setting, load_seconds)
        if key not in self._known:
            self._known[key] = self.mean_scores(GRID[name][setting], load_seconds)
        return self._known[key]

    def totals(self, name: str, load_seconds: float) -> dict[str, Score]:
        """Total score over all traces of each setting of a policy."""
        return {setting: total(self.of(name, setting, load_seconds).values()) for setting in GRID[name]}


def best_setting(settings: Mapping[str, Score], most_gpu_hours: float = float("inf")) -> str | None:
    """Best setting within `most_gpu_hours`, by the objective; None if every setting needs more GPU hours."""
    affordable = {setting: each for setting, each in settings.items() if each.gpu_hours <= most_gpu_hours}
    return min(affordable, key=lambda setting: affordable[setting].key) if affordable else None


@dataclass(frozen=True)
class Rival:
    """A policy for comparison; `policy` is its key in GRID. Without a `setting`, the grid search selects one."""

    title: str
    policy: str
    setting: str | None = None


RIVALS = (
    Rival("queue length", "queue length"),
    Rival("utilization 80% to 20%", "utilization", FIXED_UTILIZATION),
    Rival("utilization, tuned", "utilization"),
)


@dataclass(frozen=True)
class Comparison:
    """Settings of a rival, and of the fleet's policy within the rival's GPU hours, for one load time.

    `ours` is None if every setting of the fleet's policy needs more GPU hours than the rival.
    """

    rival: Rival
    load_seconds: float
    setting: str
    ours: str | None


class Totals(Protocol):
    """Total scores of all settings over all traces."""

    def totals(self, name: str, load_seconds: float, /) -> Mapping[str, Score]:
        """Total scores by setting of a policy."""


def compare(tuned: Totals, rival: Rival, load_seconds: float) -> Comparison:
    """Select both settings on the tuning arrivals."""
    settings = tuned.totals(rival.policy, load_seconds)
    setting = rival.setting or best_setting(settings)
    assert setting is not None
    ours = best_setting(tuned.totals(OURS, load_seconds), settings[setting].gpu_hours)
    return Comparison(rival, load_seconds, setting, ours)


def main() -> None:
    """Run all simulations and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--load-seconds", type=float, nargs="+", default=LOAD_SECONDS, metavar="S", help="load times of a replica"
    )
    args = parser.parse_args()
    began = time.process_time()
    tuned, reported = Bench(TUNED_SEEDS), Bench(REPORTED_SEEDS)
    say("# Autoscaling, simulated: minutes over the SLO / GPU hours")
    say()
    requests = (f"{name}: {sum(len(each.arrivals) for each in traces)}" for name, traces in reported.traces.items())
    say(f"Means over {len(REPORTED_SEEDS)} seeds. Requests of all seeds: {'; '.join(requests)}")
    say()
    results: list[Sequence[object]] = []
    chosen: list[Sequence[object]] = []
    zero: list[Sequence[object]] = []
    grid: list[Sequence[object]] = []
    for load_seconds in args.load_seconds:
        comparisons = [compare(tuned, rival, load_seconds) for rival in RIVALS]
        results += _result_rows(reported, comparisons)
        chosen += [(f"{load_seconds:g} s", each.rival.title, each.setting, each.ours or "none") for each in comparisons]
        zero.append(_zero_row(tuned, reported, load_seconds))
        grid += _grid_rows(tuned, load_seconds)
    say('To the right of each other policy, "ours" is the fleet\'s policy within the GPU hours of that policy:')
    say()
    print_table(("load", "trace", *(title for each in RIVALS for title in (each.title, "ours"))), results)
    print_table(("load", "other policy", "its setting", "our setting"), chosen)
    say("Minutes / GPU hours of the fleet's policy with its best setting:")
    say()
    print_table(("load", "setting", "minimum of one replica", "minimum of zero replicas"), zero)
    say(
        "Minutes / GPU hours of all settings of the fleet's policy, summed over traces, as means over the tuning seeds:"
    )
    say()
    print_table(("load", "targetSeconds", "window", *(f"headroom {each:g}" for each in HEADROOMS)), grid)
    say(f"CPU seconds of this run: {time.process_time() - began:.0f}")


def _result_rows(reported: Bench, comparisons: Sequence[Comparison]) -> list[Sequence[object]]:
    """Table rows: one per trace, and their sum."""
    pairs = [_pair(reported, each) for each in comparisons]
    return [
        (f"{comparisons[0].load_seconds:g} s", trace, *(cell for pair in pairs for cell in _marked(*pair[trace])))
        for trace in (*reported.traces, ALL)
    ]


def _pair(reported: Bench, comparison: Comparison) -> dict[str, tuple[Score, Score | None]]:
    """Scores by trace of the rival and of the fleet's policy."""
    theirs = reported.of(comparison.rival.policy, comparison.setting, comparison.load_seconds)
    ours = reported.of(OURS, comparison.ours, comparison.load_seconds) if comparison.ours else None
    pairs = {name: (each, ours[name] if ours else None) for name, each in theirs.items()}
    return pairs | {ALL: (total(theirs.values()), total(ours.values()) if ours else None)}


def _marked(theirs: Score, ours: Score | None) -> tuple[str, str]:
    """Format both scores; the better one (fewer minutes, then fewer GPU hours) is bold."""
    if ours is None:
        return f"**{theirs}**", "none"
    return (f"**{theirs}**", str(ours)) if theirs.key < ours.key else (str(theirs), f"**{ours}**")


def _zero_row(tuned: Bench, reported: Bench, load_seconds: float) -> Sequence[object]:
    setting = best_setting(tuned.totals(OURS, load_seconds))
    assert setting is not None
    to_zero = reported.mean_scores(lambda: WANTED[setting].policy(least=0), load_seconds)
    one = total(reported.of(OURS, setting, load_seconds).values())
    return f"{load_seconds:g} s", setting, one, total(to_zero.values())


def _grid_rows(tuned: Bench, load_seconds: float) -> list[Sequence[object]]:
    """Table rows: one per target and window, with a column per headroom."""
    totals = tuned.totals(OURS, load_seconds)
    rows = dict.fromkeys((each.target, each.window) for each in WANTED.values())
    return [
        (
            f"{load_seconds:g} s",
            f"{target:g}",
            f"{window:g} s",
            *(totals[str(WantedSeconds(target, headroom, window))] for headroom in HEADROOMS),
        )
        for target, window in rows
    ]


if __name__ == "__main__":
    main()
