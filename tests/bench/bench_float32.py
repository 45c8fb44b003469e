"""Temporary in-place conversion of modules to float32, for reference results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


def float32_bytes(modules: Iterable[nn.Module]) -> int:
    """Size of the modules' weights and buffers in float32, in bytes."""
    return sum(4 * tensor.numel() for tensor in _tensors(modules))


@contextmanager
def in_float32(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Convert weights and buffers to float32 in the block; values are unchanged.

    Enter and exit it outside inference mode, as inference tensors cannot become parameters.
    """
    dtypes = [(tensor, tensor.dtype) for tensor in _tensors(modules)]
    for tensor, _ in dtypes:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in dtypes:
            tensor.data = tensor.data.to(dtype)


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Weights and buffers in bfloat16, float16 or float32; each shared tensor once."""
    found = (chain(each.parameters(), each.buffers()) for each in modules)
    narrow = (torch.bfloat16, torch.float16, torch.float32)
    return list({id(tensor): tensor for tensor in chain.from_iterable(found) if tensor.dtype in narrow}.values())
