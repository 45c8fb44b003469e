"""A streamed video survives lost and stopped processes. Bytes are delivered once; no finished block is repeated.

tests/fleet/chaos/run_stream_faults.py kills and stops denoiser, decoder and coordinator, within and between blocks.
"""

from __future__ import annotations

import asyncio
import signal

from async_tests import HANG_SECONDS
from resume_fleet import served
from stream_faults import (
    CAUSAL,
    WITHIN,
    cancelled,
    coordinator_fault,
    expired,
    slow_follower,
    undisturbed,
    worker_fault,
)


def test_each_byte_is_delivered_once_after_lost_and_stopped_processes() -> None:
    async def scenario() -> None:
        async with asyncio.timeout(HANG_SECONDS), served(CAUSAL) as fleet:
            whole = await undisturbed(fleet)
            await worker_fault(fleet, whole, "denoising", signal.SIGKILL, WITHIN)
            await worker_fault(fleet, whole, "denoising", signal.SIGSTOP, WITHIN)
            await worker_fault(fleet, whole, "decoding", signal.SIGKILL, 0)
            await cancelled(fleet)
            await expired(fleet)
            await slow_follower(fleet, whole)
            await coordinator_fault(fleet, whole, signal.SIGKILL, WITHIN)

    asyncio.run(scenario())
