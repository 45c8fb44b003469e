"""Latency from a request's cancellation to the next request's first step on the same denoiser.

A long request is ended by CancelRequest, by a disconnected caller and by its deadline, while another request waits for
the same worker. The time until the worker starts the other request's first step comes from the worker's step log. Run
it with: python tests/bench/cancel.py
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bench_paced import build_checkpoint, follow, paced_fleet, submission
from bench_report import median, print_machine, print_table, print_verdict, quantile

from fleet.v1 import generation_pb2 as api
from fleet.v1 import generation_pb2_grpc

Stub = generation_pb2_grpc.GenerationServiceStub
LONG = 1_000  # steps of the cancelled request
SHORT = 3  # steps of the next request
BEYOND_MS = 100.0  # budget in addition to one step

Method = Callable[[Stub], Iterator[str | int]]
"""Submits and ends a request: yields its id, then the time of its end, in ns of the monotonic clock."""


def by_call(stub: Stub) -> Iterator[str | int]:
    """End the request by CancelRequest."""
    request_id = stub.Submit(submission(LONG)).request.request_id
    yield request_id
    yield time.monotonic_ns()
    stub.CancelRequest(api.CancelRequestRequest(request_id=request_id))


def by_disconnect(stub: Stub) -> Iterator[str | int]:
    """End the request by disconnecting the caller of Generate."""
    call = stub.Generate(api.GenerateRequest(request=submission(LONG)))
    yield next(iter(call)).accepted.request_id
    yield time.monotonic_ns()
    call.cancel()


def by_deadline(stub: Stub) -> Iterator[str | int]:
    """End the request by its deadline, some seconds after its start."""
    request = submission(LONG)
    due = time.time_ns() + 3 * 10**9
    request.deadline.FromNanoseconds(due)
    yield stub.Submit(request).request.request_id
    yield time.monotonic_ns() + due - time.time_ns()


METHODS: Mapping[str, Method] = {
    "CancelRequest": by_call,
    "disconnect of Generate": by_disconnect,
    "deadline": by_deadline,
}


def time_to_next(stub: Stub, log: Path, method: Method) -> float:
    """Milliseconds from a request's end to the first step of the waiting request."""
    ending = method(stub)
    follow(stub, str(next(ending)), 2)
    waiting = stub.Submit(submission(SHORT)).request.request_id
    ended = int(next(ending))
    next(ending, None)
    follow(stub, waiting, SHORT)
    stub.CancelRequest(api.CancelRequestRequest(request_id=waiting))
    return (int(log.read_text().split()[-SHORT]) - ended) / 1e6


def main() -> None:
    """Measure all methods and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="cancellations per method")
    parser.add_argument("--sleep-ms", type=float, default=25.0, help="transformer time per step, without UniPC")
    args = parser.parse_args()
    print_machine(f"Cancellation, {args.rounds} times per method")
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = build_checkpoint(directory / "model", args.sleep_ms / 1e3)
        with paced_fleet(directory, model, ("--step-seconds", "0")) as (stub, (log,)):
            for _ in range(args.rounds):
                for method, end in METHODS.items():
                    found[method].append(time_to_next(stub, log, end))
        begins = [int(line) / 1e6 for line in log.read_text().split()]
    step = median(after - before for before, after in itertools.pairwise(begins))
    rows = [(method, median(times), max(times)) for method, times in found.items()]
    print_table(("ms until the next request's first step, after", "median", "maximum"), rows)
    times = [each for method in found.values() for each in method]
    print_verdict(f"p90, with steps of {step:.0f} ms", quantile(times, 0.9), step + BEYOND_MS, "ms")


if __name__ == "__main__":
    main()
