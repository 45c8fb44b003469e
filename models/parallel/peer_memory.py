"""Memory that all GPUs of one host can write to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.parallel.mesh import Axis


@dataclass(frozen=True)
class PeerMemory:
    """A buffer of the same size on each rank of an axis, mapped into the address spaces of all ranks.

    `own` (bytes,) is this rank's buffer, uint8. `addresses` are the buffers of all ranks in this device's address
    space. The peers' buffers remain mapped while `mapping` is referenced.
    """

    own: Tensor
    addresses: Sequence[int]
    mapping: object = None


def share_memory(axis: Axis, device: torch.device, size: int) -> PeerMemory:
    """Allocate `size` zeroed bytes on each rank. A collective call: all ranks of the axis must make it."""
    # A private module of torch, imported only here: if torch removes it, workers with one rank still work.
    from torch.distributed import _symmetric_memory as symmetric_memory

    own = symmetric_memory.empty(size, dtype=torch.uint8, device=device).zero_()
    mapping = symmetric_memory.rendezvous(own, axis.group)  # type: ignore[arg-type]
    # Peers may write only after every rank has zeroed its buffer.
    mapping.barrier()
    torch.cuda.synchronize(device)
    return PeerMemory(own, mapping.buffer_ptrs, mapping)
