"""Overhead of the fleet per request: separate processes, gRPC and Redis, against one process.

Both sides run the same stages and generate the same images (the program checks that files are bit-identical). They
alternate in one run, so that load of the host affects both. Both use the same OpenMP policy: idle threads sleep,
because spinning threads take cores from computing processes. OMP_WAIT_POLICY=ACTIVE selects the other policy for both.
Run it with: python tests/bench/overhead.py
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from bench_fleet import Caller, Timeline, running_fleet
from bench_report import median, print_machine, print_table, print_verdict, quantile, say

from common.artifacts import Media, ParamValue
from common.local import HostedStages
from common.stage import Call
from fleet.v1 import generation_pb2 as api
from models.catalog import ServedModel, open_model
from models.loader import load_stages
from models.registry import load_registry
from models.runtime import Runtime
from models.validation import InputValidationStage

FIXED_MS = 15.0  # fixed part of the budget
SHARE = 0.02  # the other part of the budget, as a fraction of the time in one process
WARM_UP = 3
# Prompts differ between requests; running_fleet() disables the reply cache.
PROMPT = "a red apple, image {}"


class InProcess:
    """The model's stages in this process, called in sequence."""

    def __init__(self, model: ServedModel) -> None:
        self._validation = InputValidationStage(model)
        self._services = [
            HostedStages(
                spec.service, load_stages(model, spec, Runtime(device=torch.device("cpu"), dtype=torch.float32))
            )
            for spec in model.services
        ]

    def draw(self, seed: int, steps: int) -> tuple[dict[str, float], bytes]:
        """Run one request; returns ms by service with "total", and the file."""
        began = time.perf_counter()
        given: dict[str, ParamValue] = {"prompt": PROMPT.format(seed), "seed": seed, "num_inference_steps": steps}
        slots: dict[str, Any] = dict(self._validation.run(given).artifacts)
        spent: dict[str, float] = {}
        for service in self._services:
            before = time.perf_counter()
            present = {name: slots[name] for name in service.contract.inputs if name in slots}
            slots |= service.run(present, Call("bench"))
            spent[service.contract.name] = 1e3 * (time.perf_counter() - before)
        media: Media = slots["media"]
        file = media.items[0].data.numpy().tobytes()
        return spent | {"total": 1e3 * (time.perf_counter() - began)}, file


def main() -> None:
    """Measure, print the tables, and compare with the budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--requests", type=int, default=30, help="measured requests per side")
    args = parser.parse_args()
    print_machine(f"Overhead of the fleet: {args.model}, {args.steps} steps, {args.requests} requests per side")

    local = InProcess(open_model(args.model, load_registry()))
    with running_fleet("--model", args.model) as fleet:
        caller = Caller(fleet.endpoint)
        rows = [_pair(local, caller, seed, args.steps) for seed in range(WARM_UP + args.requests)][WARM_UP:]
        caller.close()
    _report([row[0] for row in rows], [row[1] for row in rows])


def _pair(local: InProcess, caller: Caller, seed: int, steps: int) -> tuple[Mapping[str, float], Timeline]:
    """Run one request on both sides; returns in-process times in ms by service, and the fleet's timeline."""
    spent, file = local.draw(seed, steps)
    parameters = api.GenerationParameters(prompt=PROMPT.format(seed), seed=seed, num_inference_steps=steps)
    timeline = caller.generate(parameters)
    if timeline.files != [file]:
        raise RuntimeError(
            f"seed {seed}: the fleet's image differs from the image of the same stages in this process, which uses "
            f"{torch.get_num_threads()} threads; the summation order depends on the number of threads"
        )
    return spent, timeline


def _report(local: list[Mapping[str, float]], timelines: list[Timeline]) -> None:
    totals = [each["total"] for each in local]
    fleet = [1e3 * each.finished for each in timelines]
    differences = [theirs - ours for theirs, ours in zip(fleet, totals, strict=True)]
    rows = (("one process", totals), ("fleet", fleet), ("difference of a pair: fleet - one process", differences))
    print_table(
        ("ms per request", "median", "p10", "p90"),
        [(name, median(values), quantile(values, 0.1), quantile(values, 0.9)) for name, values in rows],
    )
    stages = ", ".join(f"{name} {median(each[name] for each in local):.1f}" for name in local[0] if name != "total")
    say(f"Stages in one process, ms: {stages}. The files of both sides are bit-identical.")
    say(f"Time from each event of the fleet to the next event, ms: {_event_intervals(timelines)}.")
    ours, theirs = median(totals), median(fleet)
    say(f"Ratio of the medians, fleet to one process: {theirs / ours:.3f}")
    print_verdict("overhead of the median request", theirs - ours, FIXED_MS + SHARE * ours, "ms")


def _event_intervals(timelines: list[Timeline]) -> str:
    """Format the median times between consecutive events at the client."""
    moments = {
        "accepted": [each.accepted for each in timelines],
        "first stage begins": [each.first_progress for each in timelines],
        "denoising begins": [each.services["denoising"][0] for each in timelines],
        "last denoising step": [each.services["denoising"][1] for each in timelines],
        "decoding begins": [each.services["decoding"][0] for each in timelines],
        "decoded": [each.services["decoding"][1] for each in timelines],
        "downloaded": [each.finished for each in timelines],
    }
    names, columns = list(moments), list(moments.values())
    gaps = [columns[0], *([b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(columns))]
    return ", ".join(f"{name} +{1e3 * median(gap):.1f}" for name, gap in zip(names, gaps, strict=True))


if __name__ == "__main__":
    # OpenMP reads its policy when torch is imported, before main() runs.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    main()
