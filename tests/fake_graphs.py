"""CUDA graphs in slow motion, for tests on a CPU: a replay runs the captured call again, on its own buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.dits.base import Predictions
from models.stages.step_memory import Captured


@dataclass
class FakeGraph:
    """Keeps to the call and the buffers that it captured, whoever replays it, as a CUDA graph does."""

    run: Callable[[], Predictions]
    predictions: dict[str, Tensor] = field(default_factory=dict)
    replays: int = 0

    def replay(self) -> None:
        """Write the predictions into the captured buffers."""
        self.replays += 1
        for name, value in self.run().items():
            self.predictions.setdefault(name, torch.empty_like(value)).copy_(value)


@dataclass
class FakeCapture:
    """Captures fake graphs of `byte_size` bytes each, and counts them."""

    byte_size: int = 0
    graphs: list[FakeGraph] = field(default_factory=list)

    def __call__(self, run: Callable[[], Predictions]) -> Captured:
        """Capture the call without running it."""
        graph = FakeGraph(run)
        self.graphs.append(graph)
        return Captured(graph, graph.predictions, self.byte_size)

    @property
    def replays(self) -> int:
        """Replays of all graphs."""
        return sum(graph.replays for graph in self.graphs)
