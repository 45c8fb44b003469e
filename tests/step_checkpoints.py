"""Receivers of step checkpoints: a callback for stages, a sink for runners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.stage import STEP_CHECKPOINTS


def step_checkpoints_to(take: Callable[[Any], object]) -> Callable[[str, int, Any], None]:
    """An `on_item` callback that passes each step checkpoint to `take`."""

    def on_item(slot: str, index: int, item: Any) -> None:
        del index
        if slot == STEP_CHECKPOINTS:
            take(item)

    return on_item


@dataclass(frozen=True)
class Sink:
    """A sink for a runner's call that passes each item to `take`."""

    take: Callable[[Any], object]

    async def put(self, index: int, item: Any, byte_size: int) -> None:
        """Pass the item on."""
        del index, byte_size
        self.take(item)
