"""CPU snapshots of a running loop's tensors, which the receiver reads while the loop continues."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU; later steps do not modify the copies.

    GPU tensors are copied asynchronously to pinned memory, which PyTorch's caching host allocator reuses, with a single
    synchronization. CPU tensors are returned without a copy, because loops never modify tensors in place.
    """
    copies: dict[str, Tensor] = {}
    streams: set[torch.cuda.Stream] = set()
    for name, tensor in tensors.items():
        if tensor.device.type == "cuda":
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies[name] = buffer.copy_(tensor, non_blocking=True)
            streams.add(torch.cuda.current_stream(tensor.device))
        else:
            copies[name] = tensor
    for stream in streams:
        stream.synchronize()
    return copies
