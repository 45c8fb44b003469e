"""Autoscaling of stages, simulated: the fleet's policy against queue length and utilisation, on five traces.

The fleet's policy is the production code, common.scaling; service times are committed measurements. Each policy is
tuned for each load time by a grid of equally many settings on arrivals of one seed (fewest minutes that violate the SLO
over all traces, then fewest GPU hours), and reported on arrivals of another seed.

Run it with: python tests/bench/autoscale_sim.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_report import print_table, say
from bench_sim_fleet import Policy, Simulation, Trace
from bench_sim_policies import GRID, wanted_seconds
from bench_sim_traces import draw_trace, patterns

LOAD_SECONDS = (10.0, 60.0, 300.0)
TUNED_SEED, REPORTED_SEED = 1, 2
OURS = "wanted seconds"
SHOWN_TARGETS = (2.0, 5.0, 15.0, 30.0, 60.0)
SHOWN_HEADROOMS = (1.0, 1.5)
SHOWN_WINDOW = 300.0


@dataclass(frozen=True)
class Score:
    """Minutes that violate the SLO, and GPU hours. The order is that of the objective."""

    minutes: int
    gpu_hours: float

    def __add__(self, other: Score) -> Score:
        return Score(self.minutes + other.minutes, self.gpu_hours + other.gpu_hours)

    def __str__(self) -> str:
        return f"{self.minutes} / {self.gpu_hours:.2f}"

    @property
    def key(self) -> tuple[int, float]:
        """For comparisons: minutes, then GPU hours."""
        return self.minutes, self.gpu_hours


Scores = Mapping[str, Score]
"""By trace."""


def score(trace: Trace, policy: Callable[[], Policy], load_seconds: float) -> Score:
    """One simulation."""
    outcome = Simulation(trace, policy, load_seconds, seed=REPORTED_SEED).run()
    return Score(outcome.violation_minutes, outcome.gpu_hours)


def total(scores: Iterable[Score]) -> Score:
    """The sum over traces."""
    return sum(scores, Score(0, 0.0))


def run_grid(traces: Sequence[Trace], load_seconds: float) -> dict[str, dict[str, Scores]]:
    """Every setting of every policy on every trace: by policy, setting and trace."""
    return {
        name: {
            setting: {trace.name: score(trace, policy, load_seconds) for trace in traces}
            for setting, policy in settings.items()
        }
        for name, settings in GRID.items()
    }


def best_setting(settings: Mapping[str, Scores], most_gpu_hours: float = float("inf")) -> str | None:
    """The setting that meets the objective best among those within so many GPU hours; None without any."""
    sums = {setting: total(scores.values()) for setting, scores in settings.items()}
    affordable = {setting: each for setting, each in sums.items() if each.gpu_hours <= most_gpu_hours}
    return min(affordable, key=lambda setting: affordable[setting].key) if affordable else None


def main() -> None:
    """Simulate, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load-seconds", type=float, nargs="+", default=LOAD_SECONDS, metavar="S")
    args = parser.parse_args()
    began = time.process_time()
    tuned_traces, traces = (
        [draw_trace(name, pattern, seed) for name, pattern in patterns().items()]
        for seed in (TUNED_SEED, REPORTED_SEED)
    )
    say("# Autoscaling, simulated: minutes that violate the SLO / GPU hours")
    say()
    say("Requests: " + ", ".join(f"{trace.name} {len(trace.arrivals)}" for trace in traces))
    say()
    rows: list[Sequence[object]] = []
    chosen: list[Sequence[object]] = []
    budgets: list[Sequence[object]] = []
    sensitivity: list[Sequence[object]] = []
    for load_seconds in args.load_seconds:
        grid = run_grid(tuned_traces, load_seconds)
        settings = {name: _best(grid[name]) for name in grid}
        results = {name: _scores(traces, name, setting, load_seconds) for name, setting in settings.items()}
        rows += _rows(results, load_seconds)
        chosen += [(f"{load_seconds:g} s", name, setting) for name, setting in settings.items()]
        budgets += _budget_rows(grid, results, traces, load_seconds)
        sensitivity += _sensitivity_rows(tuned_traces, load_seconds)
    say("Each policy with its best setting for the load time:")
    say()
    print_table(("load", "trace", *GRID), rows)
    print_table(("load", "policy", "setting"), chosen)
    say("The fleet's policy at no more GPU hours (of the tuning arrivals) than each other one, all traces together:")
    say()
    print_table(("load", "other policy", "its result", "ours within its GPU hours", "our setting"), budgets)
    say(f"targetSeconds and load time, window {SHOWN_WINDOW:g} s, all traces together (the tuning arrivals):")
    say()
    print_table(("load", "headroom", *(f"targetSeconds {target:g}" for target in SHOWN_TARGETS)), sensitivity)
    say(f"CPU seconds of this run: {time.process_time() - began:.0f}")


def _best(settings: Mapping[str, Scores]) -> str:
    setting = best_setting(settings)
    assert setting is not None
    return setting


def _scores(traces: Sequence[Trace], name: str, setting: str, load_seconds: float) -> Scores:
    return {trace.name: score(trace, GRID[name][setting], load_seconds) for trace in traces}


def _rows(results: Mapping[str, Scores], load_seconds: float) -> list[Sequence[object]]:
    """A row a trace, and their sum. The fewest minutes are bold, of equally many the fewest GPU hours."""
    names = list(next(iter(results.values())))
    columns = {name: [*(scores[each] for each in names), total(scores.values())] for name, scores in results.items()}
    rows: list[Sequence[object]] = []
    for place, trace in enumerate([*names, "all five"]):
        cells = [column[place] for column in columns.values()]
        best = min(cells, key=lambda each: (each.minutes, round(each.gpu_hours, 2)))
        rows.append((f"{load_seconds:g} s", trace, *(f"**{each}**" if each is best else str(each) for each in cells)))
    return rows


def _budget_rows(
    grid: Mapping[str, Mapping[str, Scores]],
    results: Mapping[str, Scores],
    traces: Sequence[Trace],
    load_seconds: float,
) -> list[Sequence[object]]:
    rows: list[Sequence[object]] = []
    for name, scores in results.items():
        if name == OURS:
            continue
        theirs = total(grid[name][_best(grid[name])].values())
        setting = best_setting(grid[OURS], theirs.gpu_hours)
        ours = str(total(_scores(traces, OURS, setting, load_seconds).values())) if setting else "none"
        rows.append((f"{load_seconds:g} s", name, str(total(scores.values())), ours, setting or "-"))
    return rows


def _sensitivity_rows(traces: Sequence[Trace], load_seconds: float) -> list[Sequence[object]]:
    return [
        (
            f"{load_seconds:g} s",
            f"{headroom:g}",
            *(
                str(_total_of(traces, partial(wanted_seconds, target, headroom, SHOWN_WINDOW), load_seconds))
                for target in SHOWN_TARGETS
            ),
        )
        for headroom in SHOWN_HEADROOMS
    ]


def _total_of(traces: Sequence[Trace], policy: Callable[[], Policy], load_seconds: float) -> Score:
    return total(score(trace, policy, load_seconds) for trace in traces)


if __name__ == "__main__":
    main()
