"""Fuzzes all code that parses untrusted bytes.

    python tests/fleet/fuzz/run_fuzz.py --seconds 600 [--target NAME]

Exits with 1 at the first finding, whose input is added to the corpus as a regression test. The table has, for
each target, the number of inputs, the slowest input, and the memory growth of the process.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "proto"), str(Path(__file__).parent)]

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC would log every malformed byte; set before grpc is imported

from fuzz_inputs import Frames, any_input, inputs  # noqa: E402
from fuzz_live import all_targets  # noqa: E402
from fuzz_targets import Target, check  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402

from process_memory import measured_growth, resident_bytes  # noqa: E402

CORPUS = Path(__file__).parent / "corpus"
SECONDS_OF_INPUT = 5.0
FAST_TURNS = 20  # fast inputs per Hypothesis input
MOST_SEEDS = 60
NEW_SEED = 0.01
MOST_GAINED_BYTES = 512 << 20


class Hang(BaseException):
    """An input timed out. A BaseException, so that the code under test does not catch it."""


@dataclass
class Tally:
    """Statistics of a target, whose inputs have `limit_seconds` each."""

    limit_seconds: float = SECONDS_OF_INPUT
    inputs: int = 0
    slowest_seconds: float = 0.0
    gained_bytes: int = 0


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Hang in the block after `seconds`."""

    def ring(_: int, __: FrameType | None) -> None:
        raise Hang(f"no result after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Finding(Exception):
    """An input on which a target failed."""

    def __init__(self, target: Target, frames: Frames, error: BaseException) -> None:
        super().__init__(f"{target.name}: {type(error).__name__}: {error}")
        self.frames = frames


def fuzz(target: Target, examples: int, number: int, tally: Tally) -> None:
    """Run `examples` Hypothesis inputs, seeded by `number`. Raises Finding with the minimal failing input."""
    last: list[Frames] = []

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(target.seeds, target.types))
    def one(frames: Frames) -> None:
        last[:] = [frames]
        _put(target, frames, tally)

    with _watching(target, last, tally):
        one()


def fuzz_fast(target: Target, examples: int, number: int, tally: Tally) -> None:
    """Run fast random inputs, seeded by `number`. A random few of the inputs become seeds of further inputs."""
    last: list[Frames] = []
    rng = random.Random(number)
    seeds = list(target.seeds)
    with _watching(target, last, tally):
        for _ in range(examples):
            last[:] = [any_input(rng, seeds)]
            _put(target, last[0], tally)
            if len(seeds) < MOST_SEEDS and rng.random() < NEW_SEED:
                seeds.append(last[0])


def _put(target: Target, frames: Frames, tally: Tally) -> None:
    began = time.perf_counter()
    with limited(tally.limit_seconds), measured_growth() as growth:
        check(target, frames)
    if growth.peak_bytes > target.most_bytes:
        raise MemoryError(f"{growth.peak_bytes >> 20} MiB for one input")
    tally.inputs += 1
    tally.slowest_seconds = max(tally.slowest_seconds, time.perf_counter() - began)


@contextmanager
def _watching(target: Target, last: Sequence[Frames], tally: Tally) -> Iterator[None]:
    """Convert errors in the block, and excessive memory growth, to a Finding."""
    before = resident_bytes()
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or not last:
            raise
        raise Finding(target, last[0], error) from error
    tally.gained_bytes += resident_bytes() - before
    if tally.gained_bytes > MOST_GAINED_BYTES:
        raise Finding(target, last[0], MemoryError(f"{tally.gained_bytes >> 20} MiB in total"))


def read_corpus() -> Iterator[tuple[str, str, Frames]]:
    """Read the corpus: target, file name and frames of every input; a frame is a line of hex digits."""
    for path in sorted(CORPUS.glob("*/*.hex")):
        yield path.parent.name, path.name, tuple(bytes.fromhex(line) for line in path.read_text().splitlines())


def add_to_corpus(target: str, frames: Frames) -> Path:
    """Write an input to the corpus."""
    path = CORPUS / target / f"{secrets.token_hex(4)}.hex"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{frame.hex()}\n" for frame in frames))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz all targets in rounds, for the given time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=600.0, help="duration of the run (default: 600)")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="seed of the first round")
    parser.add_argument("--target", action="append", help="fuzz only these targets")
    parser.add_argument("--examples", type=int, default=50, help="Hypothesis inputs per target and round (default: 50)")
    args = parser.parse_args(argv)
    print(f"seed {args.seed}")  # noqa: T201
    logging.disable()  # Ranks log every failed call, and most calls fail here.
    with tempfile.TemporaryDirectory() as directory, all_targets(Path(directory)) as every:
        chosen = [each for each in every if not args.target or each.name in args.target]
        tallies = {target.name: Tally() for target in chosen}
        end, round_number = time.monotonic() + args.seconds, 0
        try:
            while time.monotonic() < end:
                for target in chosen:
                    fuzz(target, args.examples, args.seed + round_number, tallies[target.name])
                    fuzz_fast(target, FAST_TURNS * args.examples, args.seed + round_number, tallies[target.name])
                round_number += 1
        except Finding as finding:
            print(f"{finding}\nadded to the corpus as {add_to_corpus(str(finding).partition(':')[0], finding.frames)}")  # noqa: T201
            raise
    for name, tally in tallies.items():
        slowest, gained = tally.slowest_seconds * 1e3, tally.gained_bytes / 2**20
        print(f"{name:56} {tally.inputs:9} inputs {slowest:9.1f} ms slowest {gained:8.1f} MiB gained")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
