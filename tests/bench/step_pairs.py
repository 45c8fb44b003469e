"""Our denoising step in two checkouts, an older one and this one, in interleaved pairs on one GPU.

Each checkout has one process, which builds the workload's DiT with the same random weights and captures its CUDA graph.
Then bursts of steps alternate: before, after, before, after. The output has both medians, their ratio, the ratios of
the pairs, and whether both predictions are bit-identical. The older checkout needs models/ (without checkpoints),
configs/, common/ and tests/bench/bench_steps.py; workloads come from this checkout.

Run it with: python tests/bench/step_pairs.py --before DIR; to try it without a GPU: --device cpu --scale tiny
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bench_report import median, print_machine, print_table, say

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BURST_MS = 300.0
LARGEST_RATIO = 1.015
"""Largest ratio of step times, after to before, that a refactoring may have."""


class SideEnded(RuntimeError):
    """The process of a checkout exited; its stderr has the error."""


class Side:
    """The process of one checkout, which replies with JSON lines."""

    def __init__(self, tree: Path, overlay: Path, device: str, scale: str) -> None:
        """`overlay` is an empty folder for the bench_steps.py of `tree`, which overrides this checkout's file."""
        (overlay / "bench_steps.py").symlink_to(tree / "tests" / "bench" / "bench_steps.py")
        program = HERE / "bench_pair_side.py"
        self._tree = tree
        path = (str(tree), str(overlay), str(HERE), os.environ.get("PYTHONPATH", ""))
        # -P removes the program's folder from sys.path, where it would come first.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(program), "--tree", str(tree), "--device", device, "--scale", scale],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, **command: object) -> None:
        """Send a command. Raises SideEnded."""
        assert self._process.stdin is not None, "a pipe"
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SideEnded(f"{self._tree}: the process ended") from None

    def receive(self) -> dict[str, Any]:
        """Wait for the next reply. Raises SideEnded."""
        assert self._process.stdout is not None, "a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise SideEnded(f"{self._tree}: the process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def measure(self, steps: int) -> float:
        """Time per step in ms, in a burst. Raises SideEnded."""
        self.send(measure=steps)
        return float(self.receive()["milliseconds"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass
class Pairs:
    """Times per step in ms of each burst, by side, and whether both predictions are equal."""

    is_equal: bool
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Ratio of the medians, after to before."""
        return median(self.after) / median(self.before)


def main() -> int:
    """Measure and print the table. The exit status is 1 if a workload failed or exceeds --max-ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="an older checkout")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=("full", "tiny"))
    parser.add_argument("--work", nargs="*", help="names of bench_works.WORKS; all by default")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of bursts per workload")
    parser.add_argument("--max-ratio", type=float, default=LARGEST_RATIO, help="ratio above which a workload fails")
    args = parser.parse_args()
    print_machine(f"A denoising step of two checkouts on {args.device}, {args.pairs} interleaved pairs")
    found: dict[str, Pairs] = {}
    remaining: list[str] | None = args.work
    while remaining is None or remaining:
        with ExitStack() as resources:
            before, after = sides = [
                resources.enter_context(
                    Side(
                        tree.resolve(),
                        Path(resources.enter_context(tempfile.TemporaryDirectory())),
                        args.device,
                        args.scale,
                    )
                )
                for tree in (args.before, ROOT)
            ]
            works = [side.receive()["works"] for side in sides][1]
            remaining = works if remaining is None else remaining
            unknown = set(remaining) - set(works)
            if unknown:
                parser.error(f"--work: {', '.join(sorted(unknown))} is not one of {', '.join(works)}")
            remaining = measure_all(remaining, before, after, args.pairs, found)
    print_table(
        ("ms per step", "before", "after", "after / before", "ratios of the pairs", "bit-identical"),
        [row(name, pairs) for name, pairs in found.items()],
    )
    slower = [name for name, pairs in found.items() if not pairs.ratio <= args.max_ratio]
    say(f"Workloads that failed, or whose ratio exceeds {args.max_ratio}: {', '.join(slower) or 'none'}")
    return 1 if slower else 0


def measure_all(works: list[str], before: Side, after: Side, pairs: int, found: dict[str, Pairs]) -> list[str]:
    """Measure workloads until a workload fails. Returns the remaining workloads, which need new processes."""
    for index, name in enumerate(works):
        began = time.perf_counter()
        found[name] = Pairs(is_equal=False)
        try:
            found[name] = measure(name, before, after, pairs)
        except SideEnded as error:
            say(f"{name}: {error}")
            return works[index + 1 :]
        say(f"{name}: after / before {found[name].ratio:.4f}, measured in {time.perf_counter() - began:.0f} s")
    return []


def measure(name: str, before: Side, after: Side, count: int) -> Pairs:
    """Build a workload on both sides concurrently, then alternate bursts. Raises SideEnded."""
    sides = (before, after)
    for side in sides:
        side.send(build=name)
    digests = {side.receive()["digest"] for side in sides}
    pairs = Pairs(is_equal=len(digests) == 1)
    # Measure only after both builds, because both sides share the GPU during the builds.
    steps = max(1, round(BURST_MS / max(side.measure(1) for side in sides)))
    for _ in range(count):
        pairs.before.append(before.measure(steps))
        pairs.after.append(after.measure(steps))
    return pairs


def row(name: str, pairs: Pairs) -> tuple[str, ...]:
    """Table cells of a workload."""
    ratios = [after / before for before, after in zip(pairs.before, pairs.after, strict=True)]
    if not ratios:
        return (name, "failed", "failed", "", "", "")
    return (
        name,
        f"{median(pairs.before):.2f}",
        f"{median(pairs.after):.2f}",
        f"{pairs.ratio:.4f}",
        f"{min(ratios):.4f} to {max(ratios):.4f}",
        "yes" if pairs.is_equal else "no",
    )


if __name__ == "__main__":
    sys.exit(main())
