"""Swaps the denoisers (experts) of one model on a device that does not have memory for all of them.

The device holds one module. Its weights are overwritten in place when another expert is needed, so that CUDA graphs
that were captured with them stay valid; the host's memory, pinned for a GPU, holds the weights of every expert.
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


class ExpertRoom:
    """The module on the device, with the weights of the expert that is `present`."""

    def __init__(self, module: DiffusionTransformer, present: str) -> None:
        self._module = module
        self._memory = tuple(_storages(module))
        self._present = present

    def bring(self, expert: SwappedExpert) -> DiffusionTransformer:
        """The module with this expert's weights."""
        if expert.name != self._present:
            self._wait()
            began = time.monotonic()
            self._present = ""  # Until all is copied, the weights are no expert's.
            for memory, weights in zip(self._memory, expert.weights, strict=True):
                memory.copy_(weights, non_blocking=True)
            self._wait()
            self._present = expert.name
            EXPERT_SWAP_SECONDS.observe(time.monotonic() - began)
        return self._module

    def _wait(self) -> None:
        """Until a GPU has done what it was asked for, so that the swap alone is timed."""
        if self._memory and self._memory[0].is_cuda:
            torch.cuda.synchronize(self._memory[0].device)


@dataclass(frozen=True, eq=False)
class SwappedExpert:
    """One of several experts: its weights as bytes in the host's memory, and the room that they share."""

    name: str
    weights: tuple[Tensor, ...]
    room: ExpertRoom


def on_device(transformer: DiffusionTransformer | SwappedExpert) -> DiffusionTransformer:
    """The module that computes: the transformer itself, or the shared one with this expert's weights."""
    return transformer.room.bring(transformer) if isinstance(transformer, SwappedExpert) else transformer


def swapped_experts(
    names: Sequence[str], load: Callable[[str], DiffusionTransformer]
) -> dict[str, DiffusionTransformer | SwappedExpert]:
    """Load experts one after the other, so that no two are on the device together.

    Raises CheckpointError for experts of different sizes.
    """
    hosted: dict[str, tuple[Tensor, ...]] = {}
    module = None
    for name in names:
        module = None  # Frees the one before.
        module = load(name)
        hosted[name] = _on_host(tuple(_storages(module)))
    if module is None:
        return {}
    room = ExpertRoom(module, names[-1])
    sizes = {name: [len(each) for each in weights] for name, weights in hosted.items()}
    for name in names:
        if sizes[name] != sizes[names[0]]:
            raise CheckpointError(f"{name} and {names[0]} must have layers of equal sizes to be swapped")
    return {name: SwappedExpert(name, weights, room) for name, weights in hosted.items()}


def _on_host(memory: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies in the host's memory, pinned where the device is a GPU: in one piece, for each is rounded up a lot."""
    ends = list(accumulate((len(each) for each in memory), initial=0))
    room = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=any(each.is_cuda for each in memory))
    return tuple(room[start:end].copy_(each) for (start, end), each in zip(pairwise(ends), memory, strict=True))


def _storages(module: nn.Module) -> Iterator[Tensor]:
    """All memory of a module's weights as bytes, each once, in an order that depends on its architecture alone."""
    seen: set[int] = set()
    for tensor in _tensors(module):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and what layers made of them once: joined weights and scales."""
    for each in module.modules():
        yield from each.parameters(recurse=False)
        yield from each.buffers(recurse=False)
        for value in vars(each).values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, JoinedLinear):
                yield from value.tensors()
