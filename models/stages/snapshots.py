"""Tensors of a running loop as they are now, on the CPU, for others to read while the loop goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, in memory that the device does not write to any more.

    From a GPU all are copied together, into page-locked memory, which torch keeps for the next time: at the speed of
    the bus, and waited for once. What is on the CPU already is given as it is: loops make new tensors and leave the old
    ones alone, as Diffusers' schedulers do.
    """
    copies: dict[str, Tensor] = {}
    streams: set[torch.cuda.Stream] = set()
    for name, tensor in tensors.items():
        if tensor.device.type == "cuda":
            place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies[name] = place.copy_(tensor, non_blocking=True)
            streams.add(torch.cuda.current_stream(tensor.device))
        else:
            copies[name] = tensor
    for stream in streams:
        stream.synchronize()
    return copies
