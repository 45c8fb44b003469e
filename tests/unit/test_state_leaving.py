"""Withdrawal from a store that accepts connections and does not answer, as behind a partitioned network."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from chaos_links import Link

from common.errors import Unavailable
from common.state import presence
from common.state.connection import connect
from common.state.presence import Presence
from common.state.workers import WorkerRegistry


def test_withdrawal_does_not_wait_for_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "_LEAVE_SECONDS", 0.01)

    async def story() -> None:
        link = Link(tmp_path / "silent")
        await link.start()
        link.hold()
        async with asyncio.timeout(5), connect(f"redis://{link.address}/0") as redis:
            with pytest.raises(Unavailable, match="has not responded"):
                await WorkerRegistry(redis).withdraw("worker")
            await Presence(redis, "coordinator").stop()
        await link.close()

    asyncio.run(story())
