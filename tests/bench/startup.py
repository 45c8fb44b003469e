"""Start-up latency: time until a fleet is ready, and until a request reports its first progress.

Measured times: `fleet up` to its ready line; Submit to acceptance, to the first progress event and to the image, in a
ready fleet; and `fleet generate` without a running fleet, to the image. Run it with: python tests/bench/startup.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_fleet import Caller, Timeline, running_fleet
from bench_report import median, print_machine, print_table, print_verdict, quantile

from fleet.v1 import generation_pb2 as api

FIRST_IMAGE_SECONDS = 30.0
GENERATION_SECONDS = 5.0


def main() -> None:
    """Measure all starts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--starts", type=int, default=3, help="number of starts")
    parser.add_argument("--requests", type=int, default=10, help="requests per started fleet")
    args = parser.parse_args()
    print_machine(f"Start-up latency: {args.model}, {args.starts} starts")

    ready: list[float] = []
    first: list[Timeline] = []
    later: list[Timeline] = []
    for _ in range(args.starts):
        with running_fleet("--model", args.model) as fleet:
            ready.append(fleet.ready_seconds)
            caller = Caller(fleet.endpoint)
            timelines = [
                caller.generate(api.GenerationParameters(prompt="a red apple", seed=seed))
                for seed in range(args.requests)
            ]
            caller.close()
        first.append(timelines[0])
        later += timelines[1:]
    seconds = [_generate(args.model) for _ in range(args.starts)]

    rows = [
        ("`fleet up` to its ready line, s", ready),
        ("first request: Submit to accepted, ms", [1e3 * each.accepted for each in first]),
        ("first request: Submit to the first progress event, ms", [1e3 * each.first_progress for each in first]),
        ("first request: Submit to the image, s", [each.finished for each in first]),
        ("later requests: Submit to accepted, ms", [1e3 * each.accepted for each in later]),
        ("later requests: Submit to the first progress event, ms", [1e3 * each.first_progress for each in later]),
        ("later requests: Submit to the image, s", [each.finished for each in later]),
        ("`fleet generate` without a running fleet, s", seconds),
    ]
    print_table(("", "median", "p90"), [(name, median(found), quantile(found, 0.9)) for name, found in rows])
    print_verdict("`fleet generate` without a running fleet", median(seconds), FIRST_IMAGE_SECONDS, "s")
    print_verdict(
        "first request in a ready fleet: Submit to the image",
        median(each.finished for each in first),
        GENERATION_SECONDS,
        "s",
    )


def _generate(model: str) -> float:
    """Seconds of one `fleet generate`, including process start and exit."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "image.png"
        command = [sys.executable, "-m", "services.cli", "generate", "a red apple", "--model", model, "--output"]
        began = time.monotonic()
        subprocess.run([*command, str(output)], check=True, capture_output=True)
        return time.monotonic() - began


if __name__ == "__main__":
    main()
