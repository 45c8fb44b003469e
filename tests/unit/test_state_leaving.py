"""Withdrawal from a store that accepts connections and does not reply, as in a network partition."""

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


def test_withdrawal_ends_although_the_store_does_not_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "_LEAVE_SECONDS", 0.01)

    async def scenario() -> None:
        link = Link(tmp_path / "silent")
        await link.start()
        link.hold()
        async with asyncio.timeout(5), connect(f"redis://{link.address}/0") as redis:
            with pytest.raises(Unavailable, match="has not responded"):
                await WorkerRegistry(redis).withdraw("worker")
            await Presence(redis, "coordinator").stop()
        await link.close()

    asyncio.run(scenario())
