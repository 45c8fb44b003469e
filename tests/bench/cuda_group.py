"""Worker groups of two GPUs: every layout against one rank, then a fleet whose ranks are killed and stopped.

First small random models of every family, in float32 over NCCL, by each way to share them out between two ranks; then
the emoji model as a fleet, by each way again, its denoising group in bfloat16 and in processes. Of that, each rank is
once killed and once stopped in the middle of a request, which must give the very same file as undisturbed.

Run it with: python tests/bench/cuda_group.py; to try its logic without cards: --device cpu
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
"""Relative L2 of two pictures that were computed in bfloat16 with sums in another order."""


def main() -> None:
    """Check, and print; ends with an error if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=tuple(FAMILIES))
    parser.add_argument("--axes", nargs="*", default=list(AXES), choices=AXES, help="that the fleets are cut along")
    parser.add_argument("--size", type=int, default=1024, help="pixels of the fleet's pictures")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    print_machine(f"Worker groups of two ranks on {args.device}")
    if args.device == "cuda":
        say(f"{torch.cuda.device_count()} of {torch.cuda.get_device_name()}")
        say()
    with tempfile.TemporaryDirectory() as folder:
        models(Path(folder), args)
        # Watched as users' groups are: a rank that loads CUDA's libraries may be silent for longer than a test has it.
        workload = Workload(args.device, args.steps, args.size, liveness_flags=(), seconds=180)
        is_right = fleets(Path(folder), args.axes, workload)
    say("Every request gave its own file." if is_right else "A request went wrong: see above.")
    if not is_right:
        sys.exit(1)


def models(folder: Path, args: argparse.Namespace) -> None:
    """Every family by every layout, against one rank on the same device."""
    rows = []
    pool = RankPool(folder, args.device)
    try:
        for name in args.families:
            place = folder / name
            place.mkdir()
            pool.join(Degrees())
            case = make_case(FAMILIES[name], place, partial(on_one_rank, pool))
            for degrees in LAYOUTS.values():
                errors = check(pool, case, degrees, place)
                rows.append((f"{name}, {degrees}", *(f"{error:.1e}" for error in errors.values())))
    finally:
        pool.close()
    print_table(("relative L2 from one rank", "a prediction (1e-5)", "a loop (1e-4)"), rows)


def on_one_rank(pool: RankPool, function: Any, **keywords: Any) -> object:
    """As make_case() asks for it."""
    return pool.call(f"rank_calls:{function.__name__}", **keywords)


def fleets(folder: Path, axes: Sequence[str], workload: Workload) -> bool:
    """One rank, then every layout, undisturbed and disturbed; whether all was as it should be."""
    with group_fleet(place(folder, "alone"), workload=workload) as fleet:
        alone = fleet.generate()
    were_right = [layout_is_right(place(folder, axis), axis, workload, alone) for axis in axes]
    return all(were_right)


def layout_is_right(directory: Path, axis: str, workload: Workload, alone: Generated) -> bool:
    """A fleet whose group has that layout, undisturbed and disturbed, against one of one rank."""
    degrees = str(LAYOUTS[axis])
    with group_fleet(directory, f"--{axis}", "2", "--warm-up", "64x64", workload=workload) as fleet:
        undisturbed = fleet.generate()
        apart = picture_error(undisturbed, alone)
        is_right = apart <= MOST_APART
        rows = [(degrees, "undisturbed", f"{apart:.1e}", "", "")]
        for number in (signal.SIGKILL, signal.SIGSTOP):
            for rank in (1, 0):
                seconds, generated = disturbed(fleet, rank, number)
                same = generated.state == pb.REQUEST_STATE_SUCCEEDED and generated.file == undisturbed.file
                again = generated.steps.count(0) == 2  # It is told once of each group that had a part in it.
                is_right &= same and again
                rows.append((degrees, f"{number.name} of rank {rank}", said(same), said(again), f"{seconds:.1f}"))
    print_table(("a fleet's group", "", "from one rank, or the same file", "resumed", "s"), rows)
    return is_right


def said(is_so: bool) -> str:
    """For a table."""
    return "yes" if is_so else "NO"


def place(folder: Path, name: str) -> Path:
    """A directory of its own."""
    directory = folder / f"fleet-{name}"
    directory.mkdir()
    return directory


def disturbed(fleet: GroupFleet, rank: int, number: signal.Signals) -> tuple[float, Generated]:
    """A request whose rank gets a signal halfway, and how long it takes."""
    began = time.perf_counter()
    generated = fleet.generate(fleet.workload.steps // 2, partial(fleet.ranks()[rank].send_signal, number))
    return time.perf_counter() - began, generated


def picture_error(one: Generated, other: Generated) -> float:
    """Relative L2 of two requests' pictures."""
    first, second = (torch.from_numpy(np.array(Image.open(io.BytesIO(each.file)))) for each in (one, other))
    return relative_error(first, second)


if __name__ == "__main__":
    main()
