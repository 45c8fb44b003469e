"""Cost of traces per request: a fleet that exports every span, against a fleet without export.

Both fleets run concurrently and generate the same images in pairs of sequential requests; the order of the fleets
alternates between pairs, so that load of the host affects both. The receiver is in this process. Run it with: python
tests/bench/trace_cost.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from bench_fleet import Caller, RunningFleet, running_fleet
from bench_report import median, print_machine, print_table, print_verdict, quantile, say

from fleet.v1 import generation_pb2 as api

sys.path.append(str(Path(__file__).parents[1]))  # the receiver

from otlp_receiver import receiving

SHARE = 0.01  # budget, as a fraction of the time without traces
WARM_UP = 3
# Prompts differ between requests; running_fleet() disables the reply cache.
PROMPT = "a red apple, number {}"


class Side:
    """One of the two fleets, with the times of its requests."""

    def __init__(self, fleet: RunningFleet) -> None:
        self._caller = Caller(fleet.endpoint)
        self._processes = psutil.Process(fleet.process_id).children(recursive=True)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def draw(self, number: int, steps: int, size: int) -> bytes:
        """Run one request; returns its file."""
        parameters = api.GenerationParameters(
            prompt=PROMPT.format(number), seed=number, num_inference_steps=steps, height=size, width=size
        )
        before = self._cpu()
        began = time.perf_counter()
        (file,) = self._caller.generate(parameters).files
        self.seconds.append(time.perf_counter() - began)
        self.cpu_seconds.append(self._cpu() - before)
        return file

    def _cpu(self) -> float:
        return sum(sum(each.cpu_times()[:2]) for each in self._processes)

    def close(self) -> None:
        """Close the channel."""
        self._caller.close()


def main() -> None:
    """Measure, print the table, and compare with the budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=256, help="width and height of the image")
    parser.add_argument("--pairs", type=int, default=60, help="measured pairs of requests")
    args = parser.parse_args()
    print_machine(f"Cost of traces: {args.model}, {args.size}x{args.size}, {args.steps} steps, {args.pairs} pairs")
    with receiving() as receiver:
        on = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint}
        off = {"OTEL_SDK_DISABLED": "true"}
        with (
            running_fleet("--model", args.model, settings=off) as without,
            running_fleet("--model", args.model, settings=on) as traced,
        ):
            sides = Side(without), Side(traced)
            for number in range(WARM_UP + args.pairs):
                order = sides if number % 2 else sides[::-1]
                if len({side.draw(number, args.steps, args.size) for side in order}) != 1:
                    raise RuntimeError(f"seed {number}: the two fleets generated different images")
            for side in sides:
                side.close()
        spans = len(receiver.spans)
    _report(*sides, spans / (WARM_UP + args.pairs))


def _report(without: Side, traced: Side, spans: float) -> None:
    rows = [
        ("without traces", _milliseconds(without.seconds), _milliseconds(without.cpu_seconds)),
        ("with traces", _milliseconds(traced.seconds), _milliseconds(traced.cpu_seconds)),
    ]
    print_table(
        ("ms per request", "median", "p10", "p90", "CPU ms of the fleet, median"),
        [(name, median(each), quantile(each, 0.1), quantile(each, 0.9), median(cpu)) for name, each, cpu in rows],
    )
    differences = [b - a for a, b in zip(rows[0][1], rows[1][1], strict=True)]
    base = median(rows[0][1])
    say(f"Spans per request: {spans:.1f}. Median difference of a pair: {median(differences):.2f} ms of {base:.1f} ms.")
    print_verdict("cost of traces, median of the pairs", 100 * median(differences) / base, 100 * SHARE, "%")


def _milliseconds(seconds: Sequence[float]) -> list[float]:
    return [1e3 * each for each in seconds[WARM_UP:]]


if __name__ == "__main__":
    main()
