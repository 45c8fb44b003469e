"""Time and memory of the device that a bench runs on."""

from __future__ import annotations

import gc
import time

import torch


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def empty(device: torch.device) -> None:
    """Give the card's memory back to the other processes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
