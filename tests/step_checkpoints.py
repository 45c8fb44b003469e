"""Calls whose step checkpoints are kept, at a stage and at a runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.stage import STEP_CHECKPOINTS


def step_checkpoints_to(take: Callable[[Any], object]) -> Callable[[str, int, Any], None]:
    """`on_item` of a stage's call that gives each step checkpoint to `take`."""

    def on_item(slot: str, index: int, item: Any) -> None:
        del index
        if slot == STEP_CHECKPOINTS:
            take(item)

    return on_item


@dataclass(frozen=True)
class Sink:
    """A sink of a runner's call that gives each item to `take`."""

    take: Callable[[Any], object]

    async def put(self, index: int, item: Any, byte_size: int) -> None:
        """Take an item."""
        del index, byte_size
        self.take(item)
