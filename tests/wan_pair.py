"""A Wan checkpoint opened by this project and by Diffusers, and the parity check of both results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from local_fleet import LocalFleet, open_fleet, relative_error

LATENTS_WITHIN = 1e-4
"""Largest relative L2 error of latents."""
PIXELS_WITHIN = 1e-3
"""Largest absolute error of pixel values and audio samples."""

Pair = tuple[LocalFleet, Any]


def open_pair(path: Path, kind: Any) -> Pair:
    """Open the fleet in this process and Diffusers' pipeline."""
    torch.set_num_threads(2)
    return open_fleet(str(path)), open_reference(path, kind)


def open_reference(path: Path, kind: Any) -> Any:
    """Open Diffusers' pipeline class `kind`, without a progress bar."""
    pipeline = kind.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Assert equal shapes, and float32 tolerances for latents and pixels."""
    assert ours["latents"].shape == theirs["latents"].shape
    assert ours["pixels"].shape == theirs["pixels"].shape
    assert relative_error(ours["latents"], theirs["latents"]) <= LATENTS_WITHIN
    assert float((ours["pixels"] - theirs["pixels"]).abs().max()) <= PIXELS_WITHIN
    assert float(theirs["pixels"].std()) > 0.05, "a flat video would prove nothing"
