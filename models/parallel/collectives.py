"""Functional collectives on one axis of the mesh.

The functions call the operators beneath torch.distributed's functional collectives: torch.compile can trace these
operators, and CUDA graphs can capture them. The result of a start_...() function may be read only after wait();
computation between the two calls overlaps with the transfer. Ranks never exchange sizes, which all ranks know, and the
host never waits for the device. An axis with one rank has no process group: callers must skip its collectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.parallel.mesh import Axis

_OPS = torch.ops._c10d_functional


def wait(started: Tensor) -> Tensor:
    """Wait for the result of a started collective, and return it."""
    result: Tensor = _OPS.wait_tensor(started)
    return result


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over all ranks, with the same bytes on each rank. The callee owns x and may overwrite it with the sum."""
    # torch.compile needs the functional operator, which the compiler makes in-place where possible.
    reduce = _OPS.all_reduce if torch.compiler.is_compiling() else _OPS.all_reduce_
    started: Tensor = reduce(x.contiguous(), "sum", axis.group)
    return wait(started)


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Tensors of all ranks, (ranks, *shape). x has the same shape on all ranks."""
    started: Tensor = _OPS.all_gather_into_tensor(x.contiguous()[None], axis.size, axis.group)
    return wait(started)


def gather_last(x: Tensor, axis: Axis) -> Tensor:
    """Tensors of all ranks, concatenated along the last dimension. x has the same shape on all ranks."""
    return torch.cat(all_gather(x, axis).unbind(), dim=-1)


def gather_chunks(x: Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> Tensor:
    """Chunks of all ranks, concatenated along `dim`. `sizes` are the ranks' sizes of that dimension.

    Smaller chunks are padded to the largest size for a single all-gather; the padding is dropped from the result.
    """
    missing = max(sizes) - x.shape[dim]
    if missing:
        shape = (*x.shape[:dim], missing, *x.shape[dim + 1 :])
        x = torch.cat((x, x.new_zeros(shape)), dim=dim)
    parts = all_gather(x, axis).unbind()
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim=dim)


def start_all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Tensor:
    """Start an all-to-all of rows of x: `sent[i]` rows to rank i, `received[i]` rows from rank i."""
    started: Tensor = _OPS.all_to_all_single(x.contiguous(), list(received), list(sent), axis.group)
    return started


def start_shift(x: Tensor, received: int, axis: Axis) -> Tensor:
    """Start to send all rows of x to the next rank of the ring, and to receive rows from the previous one.

    `received` is the number of rows from the previous rank. The call is an all-to-all, because not all backends can
    capture functional point-to-point operators.
    """
    sent_to, received_from = [0] * axis.size, [0] * axis.size
    sent_to[(axis.index + 1) % axis.size] = x.shape[0]
    received_from[(axis.index - 1) % axis.size] = received
    return start_all_to_all(x, sent_to, received_from, axis)
