"""Cost of step checkpoints in the denoising loop of Wan 2.1.

A step checkpoint has 34 MB of latents and UniPC history; a step takes 40 ms. Three worker processes denoise
alternately, with a coordinator and a Redis that syncs every write: without step checkpoints, with the default interval,
and with one step checkpoint per 25 steps. The transformer only sleeps; everything else is real. The cost of one step
checkpoint is measured with the last worker: its 12 steps after a step checkpoint are compared with the 12 steps before
the next one, so that a temporarily slow host affects both. Run it with: python tests/bench/checkpoint_cost.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from bench_paced import build_checkpoint, denoise, paced_fleet
from bench_report import median, print_machine, print_table, print_verdict, quantile

from services.worker_settings import LoopSettings

STATE_MB = 4 * 16 * 21 * 60 * 104 * 4 / 1e6  # latents, two predictions, the last sample: float32, 81 frames of 480x832
SHARE = 0.01  # budget as a fraction of the default interval
EVERY = 25
WITHOUT = ("--step-checkpoint-seconds", "0")
NEVER, BY_DEFAULT, OFTEN = "none", "by default", f"every {EVERY} steps"
INTERVALS: Mapping[str, tuple[str, ...]] = {
    NEVER: WITHOUT,
    BY_DEFAULT: (),
    OFTEN: (*WITHOUT, "--step-checkpoint-every", str(EVERY)),
}


def steps_of(log: Path, steps: int) -> list[list[float]]:
    """Milliseconds between the starts of consecutive steps, by request."""
    begins = [int(line) / 1e6 for line in log.read_text().split()]
    if len(begins) % steps:
        raise RuntimeError(f"{log}: {len(begins)} steps are not a multiple of {steps}; every request needs all steps")
    requests = [begins[start : start + steps] for start in range(0, len(begins), steps)]
    return [[after - before for before, after in pairwise(request)] for request in requests]


def checkpoint_costs(requests: list[list[float]]) -> list[float]:
    """Delay in ms of the steps after each step checkpoint, against the steps before the next one.

    A step checkpoint is taken at the end of step 25, 50 ..., so that its time is included in step 25.
    """
    half = EVERY // 2
    costs = []
    for steps in requests:
        for at in range(EVERY - 1, len(steps) - EVERY, EVERY):
            after, later = steps[at : at + half], steps[at + EVERY - half : at + EVERY]
            costs.append(sum(after) - sum(later))
    return costs


def main() -> None:
    """Measure all workers and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="steps per request")
    parser.add_argument("--rounds", type=int, default=3, help="requests per worker")
    parser.add_argument("--sleep-ms", type=float, default=25.0, help="transformer time per step, without UniPC")
    args = parser.parse_args()
    print_machine(f"Step checkpoints of {STATE_MB:.0f} MB: {args.rounds} requests of {args.steps} steps per interval")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = build_checkpoint(directory / "model", args.sleep_ms / 1e3)
        with paced_fleet(directory, model, *INTERVALS.values()) as (stub, logs):
            for _ in range(args.rounds * len(INTERVALS)):  # idle workers are used alternately
                denoise(stub, args.steps)
        found = {name: steps_of(log, args.steps) for name, log in zip(INTERVALS, logs, strict=True)}
    rows = []
    for name, requests in found.items():
        steps = [each for request in requests for each in request]
        rows.append((name, len(steps), sum(steps) / len(steps), median(steps), quantile(steps, 0.99)))
    print_table(("step checkpoints", "steps", "mean ms per step", "median", "p99"), rows)
    costs = checkpoint_costs(found[OFTEN])
    print_table(
        ("", "median", "p10", "p90"),
        [
            (
                f"ms of delay per step checkpoint ({len(costs)} samples)",
                median(costs),
                quantile(costs, 0.1),
                quantile(costs, 0.9),
            )
        ],
    )
    interval = 1e3 * LoopSettings.step_checkpoint_seconds
    print_verdict(
        "delay per step checkpoint, of the default interval", 100 * median(costs) / interval, 100 * SHARE, "%"
    )


if __name__ == "__main__":
    main()
