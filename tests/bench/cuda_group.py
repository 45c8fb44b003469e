"""Worker groups of two GPUs: every layout compared with one rank, then fault injection in a fleet.

First, small random models of every family run in float32 over NCCL with each layout of two ranks. Then, for each
layout, a fleet serves the emoji model in bfloat16 with a denoising group of processes. Each rank is killed once and
stopped once during a request, which must return the same bytes as without a fault.

Run it with: python tests/bench/cuda_group.py; to try it without GPUs: --device cpu
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_report import print_machine, print_table, say
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fleet.v1 import generation_pb2 as pb
from group_fleet import Generated, GroupFleet, Workload, group_fleet
from local_fleet import relative_error
from models.parallel.mesh import AXES, Degrees
from parallel_cases import FAMILIES, check, make_case
from rank_pool import RankPool

LAYOUTS: dict[str, Degrees] = {axis: Degrees(**{axis: 2}) for axis in AXES}

MOST_APART = 0.02
"""Largest relative L2 error between two bfloat16 images with different summation orders."""


def main() -> None:
    """Run all checks and print the tables. The exit status is 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=tuple(FAMILIES))
    parser.add_argument("--axes", nargs="*", default=list(AXES), choices=AXES, help="mesh axes of the fleets")
    parser.add_argument("--size", type=int, default=1024, help="side of the fleet's images in pixels")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    print_machine(f"Worker groups of two ranks on {args.device}")
    if args.device == "cuda":
        say(f"{torch.cuda.device_count()} of {torch.cuda.get_device_name()}")
        say()
    with tempfile.TemporaryDirectory() as folder:
        models(Path(folder), args)
        # Default liveness flags: a rank that loads CUDA libraries may miss the shorter deadlines of tests.
        workload = Workload(args.device, args.steps, args.size, liveness_flags=(), seconds=180)
        is_right = fleets(Path(folder), args.axes, workload)
    say("Every request returned the expected file." if is_right else "A request failed: see above.")
    if not is_right:
        sys.exit(1)


def models(folder: Path, args: argparse.Namespace) -> None:
    """Compare every family and layout with one rank on the same device."""
    rows = []
    pool = RankPool(folder, args.device)
    try:
        for name in args.families:
            directory = folder / name
            directory.mkdir()
            pool.join(Degrees())
            case = make_case(FAMILIES[name], directory, partial(on_one_rank, pool))
            for degrees in LAYOUTS.values():
                errors = check(pool, case, degrees, directory)
                rows.append((f"{name}, {degrees}", *(f"{error:.1e}" for error in errors.values())))
    finally:
        pool.close()
    print_table(("relative L2 error against one rank", "prediction (1e-5)", "loop (1e-4)"), rows)


def on_one_rank(pool: RankPool, function: Any, **keywords: Any) -> object:
    """Run a function of rank_calls on the pool's single rank, for make_case()."""
    return pool.call(f"rank_calls:{function.__name__}", **keywords)


def fleets(folder: Path, axes: Sequence[str], workload: Workload) -> bool:
    """Run one rank, then every layout, with and without faults; returns whether all checks passed."""
    with group_fleet(subfolder(folder, "alone"), workload=workload) as fleet:
        alone = fleet.generate()
    were_right = [layout_is_right(subfolder(folder, axis), axis, workload, alone) for axis in axes]
    return all(were_right)


def layout_is_right(directory: Path, axis: str, workload: Workload, alone: Generated) -> bool:
    """Compare a fleet with this layout, with and without faults, with a fleet of one rank."""
    degrees = str(LAYOUTS[axis])
    with group_fleet(directory, f"--{axis}", "2", "--warm-up", "64x64", workload=workload) as fleet:
        undisturbed = fleet.generate()
        apart = image_error(undisturbed, alone)
        is_right = apart <= MOST_APART
        rows = [(degrees, "undisturbed", f"{apart:.1e}", "", "")]
        for number in (signal.SIGKILL, signal.SIGSTOP):
            for rank in (1, 0):
                seconds, generated = disturbed(fleet, rank, number)
                same = generated.state == pb.REQUEST_STATE_SUCCEEDED and generated.file == undisturbed.file
                again = generated.steps.count(0) == 2  # Each group that ran the request reports step 0 once.
                is_right &= same and again
                rows.append(
                    (degrees, f"{number.name} of rank {rank}", yes_or_no(same), yes_or_no(again), f"{seconds:.1f}")
                )
    print_table(("group", "", "error against one rank, or same file", "resumed", "s"), rows)
    return is_right


def yes_or_no(is_so: bool) -> str:
    """Table cell of a check."""
    return "yes" if is_so else "NO"


def subfolder(folder: Path, name: str) -> Path:
    """Create and return a subdirectory."""
    directory = folder / f"fleet-{name}"
    directory.mkdir()
    return directory


def disturbed(fleet: GroupFleet, rank: int, number: signal.Signals) -> tuple[float, Generated]:
    """Run a request and send a signal to a rank at half of the steps; returns seconds and outcome."""
    began = time.perf_counter()
    generated = fleet.generate(fleet.workload.steps // 2, partial(fleet.ranks()[rank].send_signal, number))
    return time.perf_counter() - began, generated


def image_error(one: Generated, other: Generated) -> float:
    """Relative L2 error between two requests' images."""
    first, second = (torch.from_numpy(np.array(Image.open(io.BytesIO(each.file)))) for each in (one, other))
    return relative_error(first, second)


if __name__ == "__main__":
    main()
