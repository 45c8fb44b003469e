"""Swaps the denoisers (experts) of one model on a device that lacks memory for all of them.

The device holds one module. Switching to another expert overwrites the module's weights in place, so that captured CUDA
graphs stay valid. Host memory, pinned for a GPU, holds the weights of every expert.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from common.errors import CheckpointError
from common.metrics import EXPERT_SWAP_SECONDS
from models.dits.base import DiffusionTransformer
from models.layers.linear import JoinedLinear


class ExpertBuffers:
    """The module on the device, whose weight buffers hold one expert at a time."""

    def __init__(self, module: DiffusionTransformer, loaded: str) -> None:
        self._module = module
        self._storages = tuple(_storages(module))
        self._loaded = loaded

    def load(self, expert: SwappedExpert) -> DiffusionTransformer:
        """Return the module with this expert's weights, copied from host memory if necessary."""
        if expert.name != self._loaded:
            self._synchronize()
            began = time.monotonic()
            self._loaded = ""  # An interrupted copy leaves weights of two experts.
            for storage, weights in zip(self._storages, expert.weights, strict=True):
                storage.copy_(weights, non_blocking=True)
            self._synchronize()
            self._loaded = expert.name
            EXPERT_SWAP_SECONDS.observe(time.monotonic() - began)
        return self._module

    def _synchronize(self) -> None:
        """Wait for the GPU's pending kernels and copies, so that only the swap is timed."""
        if self._storages and self._storages[0].is_cuda:
            torch.cuda.synchronize(self._storages[0].device)


@dataclass(frozen=True, eq=False)
class SwappedExpert:
    """One of several experts: its weights in host memory (uint8), and the shared device buffers."""

    name: str
    weights: tuple[Tensor, ...]
    buffers: ExpertBuffers


def on_device(transformer: DiffusionTransformer | SwappedExpert) -> DiffusionTransformer:
    """Return the module to run: the transformer itself, or the shared module with this expert's weights."""
    return transformer.buffers.load(transformer) if isinstance(transformer, SwappedExpert) else transformer


def swapped_experts(
    names: Sequence[str], load: Callable[[str], DiffusionTransformer]
) -> dict[str, DiffusionTransformer | SwappedExpert]:
    """Load experts sequentially; the device never holds two at once.

    Raises CheckpointError for experts of different sizes.
    """
    hosted: dict[str, tuple[Tensor, ...]] = {}
    module = None
    for name in names:
        module = None  # Frees the previous expert before the next one is loaded.
        module = load(name)
        hosted[name] = _on_host(tuple(_storages(module)))
    if module is None:
        return {}
    buffers = ExpertBuffers(module, names[-1])
    sizes = {name: [len(each) for each in weights] for name, weights in hosted.items()}
    for name in names:
        if sizes[name] != sizes[names[0]]:
            message = f"{name}: the layer sizes are not those of {names[0]}"
            raise CheckpointError(f"{message}; swapped experts must have one architecture")
    return {name: SwappedExpert(name, weights, buffers) for name, weights in hosted.items()}


def _on_host(storages: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copy to host memory, pinned for a GPU, in one allocation: each pinned allocation is rounded up."""
    ends = list(accumulate((len(each) for each in storages), initial=0))
    copies = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=any(each.is_cuda for each in storages))
    return tuple(copies[start:end].copy_(each) for (start, end), each in zip(pairwise(ends), storages, strict=True))


def _storages(module: nn.Module) -> Iterator[Tensor]:
    """The distinct storages of a module's weights as uint8, in an order fixed by the architecture."""
    seen: set[int] = set()
    for tensor in _tensors(module):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors derived from them at load time: joined weights and scales."""
    for each in module.modules():
        yield from each.parameters(recurse=False)
        yield from each.buffers(recurse=False)
        for value in vars(each).values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, JoinedLinear):
                yield from value.tensors()
