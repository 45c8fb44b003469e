"""Functional collectives on one axis of a worker group.

They are the operators beneath torch.distributed's functional collectives, which torch.compile traces and CUDA graphs
capture. What `start_...` returns has not arrived: it may be handed on, but nothing may read it before `wait`; whatever
is computed between the two runs while the bytes travel. No size is ever exchanged and no host waits for a device: sizes
follow from what all ranks know. Axes of one rank have no group: callers leave their collectives out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.parallel.mesh import Axis

_OPS = torch.ops._c10d_functional


def wait(started: Tensor) -> Tensor:
    """What a collective was started for, once it is there."""
    arrived: Tensor = _OPS.wait_tensor(started)
    return arrived


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over all ranks, the same bytes on each. x may be overwritten with it: it is a product made for this."""
    # The compiler wants the form without side effects, and finds out itself that it may overwrite.
    reduce = _OPS.all_reduce if torch.compiler.is_compiling() else _OPS.all_reduce_
    started: Tensor = reduce(x.contiguous(), "sum", axis.group)
    return wait(started)


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """The tensors of all ranks, which have one shape: (ranks, *shape)."""
    started: Tensor = _OPS.all_gather_into_tensor(x.contiguous()[None], axis.size, axis.group)
    return wait(started)


def gather_last(x: Tensor, axis: Axis) -> Tensor:
    """The ranks' equal parts of the last dimension, joined."""
    return torch.cat(all_gather(x, axis).unbind(), dim=-1)


def gather_chunks(x: Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> Tensor:
    """The ranks' chunks along `dim`, joined. `sizes` are those of all ranks; only they may differ.

    Small chunks travel with a tail that nobody reads, so that one all-gather does it.
    """
    most = max(sizes)
    missing = most - x.shape[dim]
    if missing:
        shape = (*x.shape[:dim], missing, *x.shape[dim + 1 :])
        x = torch.cat((x, x.new_zeros(shape)), dim=dim)
    parts = all_gather(x, axis).unbind()
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim=dim)


def start_all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Tensor:
    """Begin to send rows of x, `sent` of them to each rank in order; what will arrive are `received` rows from each."""
    started: Tensor = _OPS.all_to_all_single(x.contiguous(), list(received), list(sent), axis.group)
    return started


def start_shift(x: Tensor, received: int, axis: Axis) -> Tensor:
    """Begin to send all rows of x to the next rank of the ring, and to receive `received` rows from the one before.

    It is an all-to-all in which each rank has something for one other only: functional point-to-point operators are
    not yet captured by every backend.
    """
    sent_to, received_from = [0] * axis.size, [0] * axis.size
    sent_to[(axis.index + 1) % axis.size] = x.shape[0]
    received_from[(axis.index - 1) % axis.size] = received
    return start_all_to_all(x, sent_to, received_from, axis)
