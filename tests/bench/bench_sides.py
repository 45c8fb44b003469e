"""Times and peak memory of a pipeline's stages, for both sides of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from bench_device import now
from bench_report import print_table
from torch import Tensor

_NONE = float("nan")


@dataclass
class Side:
    """Time in ms and peak bytes (without weights) by stage, and final latents by part on the CPU."""

    spent: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    latents: dict[str, Tensor] = field(default_factory=dict)

    def join(self, stage: str, parts: Sequence[str]) -> None:
        """Record a stage that consists of measured parts."""
        self.spent[stage] = sum(self.spent[part] for part in parts)
        if self.peaks:
            self.peaks[stage] = max(self.peaks[part] for part in parts)


class StageMeter:
    """Measures consecutive stages. Memory allocated at construction counts as weights.

    If a stage ends several times in a round, its times are summed. The results are the times of the last round, and the
    largest peaks of all rounds, because CUDA graphs allocate memory at capture, in the first round.
    """

    def __init__(self, device: torch.device, side: Side) -> None:
        self._device = device
        self._side = side
        self._weights = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.restart()

    def restart(self) -> None:
        """Start a round at its first stage."""
        self._spent: dict[str, float] = {}
        self._start_stage()

    def end(self, stage: str) -> None:
        """Record the stage and start the next one."""
        self._spent[stage] = self._spent.get(stage, 0.0) + 1e3 * (now(self._device) - self._began)
        self._side.spent[stage] = self._spent[stage]
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) - self._weights
            self._side.peaks[stage] = max(peak, self._side.peaks.get(stage, 0.0))
        self._start_stage()

    def _start_stage(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._began = now(self._device)


def print_sides(ours: Side, theirs: Side) -> None:
    """Print tables of times and, on a GPU, memory: stages of both sides first, then our other stages."""
    both = [name for name in ours.spent if name in theirs.spent]
    rows: list[tuple[str, float, float, str]] = [
        (name, ours.spent[name], theirs.spent[name], f"{ours.spent[name] / theirs.spent[name]:.2f}") for name in both
    ]
    rows += [(name, spent, _NONE, "-") for name, spent in ours.spent.items() if name not in both]
    print_table(("ms", "fleet's stages", "Diffusers", "ratio"), rows)
    if ours.peaks:
        peaks = [(name, peak / 1e9, theirs.peaks.get(name, _NONE) / 1e9) for name, peak in ours.peaks.items()]
        print_table(("GB without weights", "fleet's stages", "Diffusers"), peaks)


def latents_error(ours: Side, theirs: Side, part: str) -> float:
    """Relative L2 error of our latents of a part. Raises RuntimeError if latents are not finite."""
    own, reference = ours.latents[part].double(), theirs.latents[part].double()
    if not (own.isfinite().all() and reference.isfinite().all()):
        raise RuntimeError(f"{part}: latents are not finite; smaller random weights are needed")
    return float((own - reference).norm() / reference.norm())
