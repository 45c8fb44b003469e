"""Kills and stops denoiser, decoder and coordinator of a streamed video, within and between blocks.

Each case is one request of causal Wan on real processes; a client follows its file and events. The exit status is 0
only if every file has the bytes of a run without faults, each delivered once.

    python tests/fleet/chaos/run_stream_faults.py
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "proto"), str(Path(__file__).parent)]

from resume_fleet import served  # noqa: E402
from stream_faults import BETWEEN, CAUSAL, WITHIN, coordinator_fault, handed_over, undisturbed, worker_fault  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
PLACES = {"within a block": WITHIN, "between blocks": BETWEEN}


def print_case(case: str, began: float) -> None:
    """Print a case and its seconds."""
    sys.stdout.write(f"{case}: same bytes, delivered once, in {time.monotonic() - began:.1f} s\n")
    sys.stdout.flush()


async def main() -> None:
    """Run all cases. Each coordinator case has its own fleet, as no stub reaches a signaled coordinator again."""
    async with served(CAUSAL) as fleet:
        whole = await undisturbed(fleet)
        for service in ("denoising", "decoding"):
            for number in SIGNALS:
                for place, step in PLACES.items():
                    began = time.monotonic()
                    await worker_fault(fleet, whole, service, number, step)
                    print_case(f"{number.name} of {service} {place}", began)
        began = time.monotonic()
        await handed_over(fleet, whole)
        print_case("SIGTERM of denoising within a block", began)
    for number in SIGNALS:
        for place, step in PLACES.items():
            async with served(CAUSAL) as fleet:
                began = time.monotonic()
                await coordinator_fault(fleet, whole, number, step)
                print_case(f"{number.name} of the coordinator {place}", began)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    asyncio.run(main())
