"""A Flux checkpoint opened by this project and by Diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline

from local_fleet import LocalFleet, open_fleet


@dataclass
class Pair:
    """`ours` is a fleet in this process, `theirs` is a Diffusers FluxPipeline."""

    ours: LocalFleet
    theirs: Any

    @property
    def path(self) -> str:
        """The checkpoint's directory."""
        return str(self.ours.model.checkpoint.path)


@contextmanager
def open_pair(reference: str, dtype: torch.dtype = torch.float32) -> Iterator[Pair]:
    """Open a checkpoint with both implementations; closes the fleet afterwards."""
    fleet = open_fleet(reference, dtype)
    theirs = FluxPipeline.from_pretrained(str(fleet.model.checkpoint.path), dtype=dtype)
    theirs.set_progress_bar_config(disable=True)
    try:
        yield Pair(fleet, theirs)
    finally:
        fleet.close()
