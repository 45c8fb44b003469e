"""Worker groups of any number of GPUs: layouts against one rank, and recovery from lost ranks.

The first part compares small random models of every family in each layout with one rank, in float32, over NCCL on GPUs.
The second part runs a fleet of the emoji model for each layout, in bfloat16 on GPUs; each rank of its denoising group
is a process. In each group, the last rank and rank 0 are killed once and stopped once during a request. The request
must return the same bytes as an undisturbed request.

`--layout` sets the layouts; the default is LAYOUTS of `--ranks` ranks, which are all GPUs by default. Run it with:
python tests/bench/cuda_group.py; to check it without GPUs: --device cpu --ranks 4
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
import tempfile
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
from group_fleet import Generated, Workload, group_fleet
from local_fleet import relative_error
from models.parallel.mesh import AXES, Degrees
from parallel_cases import FAMILIES, check, make_case
from rank_pool import RankPool

LAYOUTS: dict[int, tuple[Degrees, ...]] = {
    2: tuple(Degrees(**{axis: 2}) for axis in AXES),
    4: (
        Degrees(ulysses=2, ring=2),
        Degrees(tp=2, ring=2),
        Degrees(tp=2, cfg=2),
        Degrees(ring=4),
        Degrees(ulysses=4),
    ),
    8: (
        Degrees(ulysses=4, ring=2),
        Degrees(ulysses=2, ring=4),
        Degrees(tp=2, ulysses=2, ring=2),
        Degrees(ulysses=2, ring=2, cfg=2),
        Degrees(tp=2, ring=2, cfg=2),
        Degrees(ring=8),
    ),
}
"""Default layouts by number of ranks; for 4 and 8 ranks, a selection of the possible layouts."""

WITHOUT_RING = ("wan-causal",)
"""Families whose loaders refuse a ring degree above 1: ring attention does not support KV caches."""

MOST_APART = 0.02
"""Largest relative L2 error between two images computed in bfloat16 in different summation orders."""


def main() -> None:
    """Check and print; exit code 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=tuple(FAMILIES))
    parser.add_argument(
        "--ranks",
        type=int,
        choices=tuple(LAYOUTS),
        help="ranks of a group (default: the number of GPUs, or 2 on the CPU)",
    )
    parser.add_argument("--layout", nargs="*", type=degrees_of, help='layouts, such as "tp=2,ring=2"')
    parser.add_argument("--no-fleets", action="store_true", help="compare models only")
    parser.add_argument("--size", type=int, default=1024, help="pixels of the fleet's images")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    print_machine(f"Worker groups on {args.device}")
    if args.device == "cuda":
        say(f"{torch.cuda.device_count()} of {torch.cuda.get_device_name()}")
        say()
    layouts = args.layout or LAYOUTS[args.ranks or (torch.cuda.device_count() if args.device == "cuda" else 2)]
    with tempfile.TemporaryDirectory() as folder:
        models(Path(folder), args.device, args.families, layouts)
        if args.no_fleets:
            return
        # Default liveness settings: while a rank loads CUDA's libraries, it may send no heartbeat for seconds.
        workload = Workload(args.device, args.steps, args.size, liveness_flags=())
        is_right = fleets(Path(folder), layouts, workload)
    say("Every check passed." if is_right else "A check failed: see NO and errors above the limit in the tables.")
    if not is_right:
        sys.exit(1)


def degrees_of(text: str) -> Degrees:
    """Degrees from text such as "tp=2,ring=2"."""
    return Degrees(**{axis: int(degree) for axis, degree in (pair.split("=") for pair in text.split(","))})


def models(folder: Path, device: str, families: Sequence[str], layouts: Sequence[Degrees]) -> None:
    """Compare every family in every layout with one rank on the same device."""
    rows: list[tuple[str, ...]] = []
    pool = RankPool(folder, device, max(layout.world_size for layout in layouts))
    try:
        for name in families:
            directory = folder / name
            directory.mkdir()
            pool.join(Degrees())
            case = make_case(FAMILIES[name], directory, partial(on_one_rank, pool))
            for degrees in layouts:
                if degrees.ring > 1 and name in WITHOUT_RING:
                    rows.append((f"{name}, {degrees}", "refuses a ring", ""))
                    continue
                errors = check(pool, case, degrees, directory)
                rows.append((f"{name}, {degrees}", *(f"{error:.1e}" for error in errors.values())))
    finally:
        pool.close()
    print_table(("relative L2 error against one rank", "prediction (1e-5)", "loop (1e-4)"), rows)


def on_one_rank(pool: RankPool, function: Any, **keywords: Any) -> object:
    """Call a function on the only rank of the pool."""
    return pool.call(f"rank_calls:{function.__name__}", **keywords)


def fleets(folder: Path, layouts: Sequence[Degrees], workload: Workload) -> bool:
    """Run one rank, then every layout, undisturbed and disturbed. Returns whether all results were correct."""
    with group_fleet(subfolder(folder, "alone"), workload=workload) as fleet:
        alone = fleet.generate()
    were_right = [layout_is_right(folder, layout, workload, alone) for layout in layouts]
    return all(were_right)


def layout_is_right(folder: Path, degrees: Degrees, workload: Workload, alone: Generated) -> bool:
    """Compare a fleet whose group has this layout, undisturbed and disturbed, with a fleet of one rank."""
    axes = [axis for axis in AXES if degrees.of(axis) > 1]
    flags = [word for axis in axes for word in (f"--{axis}", str(degrees.of(axis)))]
    directory = subfolder(folder, "-".join(f"{axis}{degrees.of(axis)}" for axis in axes))
    with group_fleet(directory, *flags, "--warm-up", "64x64", workload=workload) as fleet:
        undisturbed = fleet.generate()
        apart = image_error(undisturbed, alone)
        is_right = apart <= MOST_APART
        rows = [(str(degrees), "undisturbed", f"{apart:.1e}", "", "")]
        for number in (signal.SIGKILL, signal.SIGSTOP):
            for rank in (degrees.world_size - 1, 0):
                generated = fleet.lose_rank(rank, number)
                same = generated.state == pb.REQUEST_STATE_SUCCEEDED and generated.file == undisturbed.file
                # The coordinator reports step 0 each time a group starts the request.
                resumed = generated.steps.count(0) == 2
                is_right &= same and resumed
                rows.append(
                    (
                        str(degrees),
                        f"{number.name} of rank {rank}",
                        yes_or_no(same),
                        yes_or_no(resumed),
                        f"{generated.seconds:.1f}",
                    )
                )
    print_table(("a fleet's group", "", "error against one rank, or equal file", "resumed", "s"), rows)
    return is_right


def yes_or_no(is_so: bool) -> str:
    """Table cell of a check."""
    return "yes" if is_so else "NO"


def subfolder(folder: Path, name: str) -> Path:
    """A new directory of a fleet."""
    directory = folder / f"fleet-{name}"
    directory.mkdir()
    return directory


def image_error(one: Generated, other: Generated) -> float:
    """Relative L2 error between the images of two requests."""
    first, second = (torch.from_numpy(np.array(Image.open(io.BytesIO(each.file)))) for each in (one, other))
    return relative_error(first, second)


if __name__ == "__main__":
    main()
