"""Branches of guidance: the predictions of one step, on one rank or shared between the ranks of the cfg axis."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from configs.pipeline_configs.base import Parts
from models.dits.base import DiffusionTransformer, Predictions, Prepared
from models.layers.step_cache import StepCache
from models.parallel.collectives import all_gather, all_reduce
from models.parallel.mesh import Axis
from models.stages.step_memory import NO_FLAGS, Flags, Lease, StepInputs, StepMemory, Tensors


@dataclass(frozen=True)
class StepCaching:
    """Reuse of earlier steps' blocks where the first block changed by less than the threshold (relative L1).

    Ranks along `axes` decide together.
    """

    threshold: float
    axes: tuple[Axis, ...] = ()

    def new_cache(self) -> StepCache:
        """An empty cache of a branch."""
        return StepCache(self._sum_over_ranks)

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        for axis in self.axes:
            if axis.size > 1:
                sums = all_reduce(sums, axis)
        return sums


class Branch:
    """One branch of a request on one denoiser: prepared once, asked at every step.

    `reused` counts the predictions that took the work of all blocks but the first from an earlier step.
    """

    def __init__(self, prepared: Prepared, memory: StepMemory, threshold: float = 0.0) -> None:
        self._prepared = prepared
        self._memory = memory
        self._threshold = threshold
        self.reused = 0

    def predict(self, latents: Tensors, step: int, flags: Flags = NO_FLAGS) -> Predictions:
        """The predictions at a step, for latents by the denoiser's keyword. `flags` are its own static keywords."""
        row = self._prepared.row(step)
        cache = self._memory.cache
        if cache is not None and cache.is_filled:
            predictions = self._memory.predict(latents, row, probe=True, flags=flags)
            if cache.change() < self._threshold:
                self.reused += 1
                return predictions
        return self._memory.predict(latents, row, flags=flags)


def lease_branch(
    lease: Lease,
    role: str,
    transformer: DiffusionTransformer,
    prepared: Prepared,
    latents: Tensors,
    *,
    flags: Mapping[str, Hashable] = MappingProxyType({}),
    caching: StepCaching | None = None,
) -> Branch:
    """A branch with memory for steps whose latents have these shapes. Raises ResourceExhausted."""
    static = {**prepared.flags, **flags}
    inputs = StepInputs(latents, prepared.row(0), prepared.constants, prepared.memory, static)
    if caching is None:
        return Branch(prepared, lease(role, transformer, inputs))
    return Branch(prepared, lease(role, transformer, inputs, caching.new_cache), caching.threshold)


MakeBranch = Callable[[str, str], Branch]
"""Makes the branch of a name on the denoiser of a role."""
Predict = Callable[[Branch], Parts]
"""The predictions of a branch by latent part."""


class Branches:
    """The branches of one request on each of its denoisers.

    Rank r of the cfg axis computes branches r, r + cfg, ... of `names` and exchanges its predictions, which changes no
    bit: branches are never one batch. With a single branch there is nothing to share, and all ranks compute it. `dtype`
    is that of the predictions.
    """

    def __init__(
        self, names: Sequence[str], roles: Sequence[str], make: MakeBranch, cfg: Axis, dtype: torch.dtype
    ) -> None:
        self._dtype = dtype
        self._names = tuple(names)
        self._cfg = cfg
        self._is_shared = cfg.size > 1 and len(names) > 1
        self._branches: dict[tuple[str, str], Branch] = {}
        for role in roles:
            for name in self._of_rank(self._names, cfg.index):
                self._branches[name, role] = make(name, role)

    def predict(self, active: Sequence[str], role: str, predict: Predict, latents: Parts) -> dict[str, Parts]:
        """The predictions of the active branches, in their order, by name and latent part; in the latents' shapes."""
        own = [predict(self._branches[name, role]) for name in self._of_rank(active, self._cfg.index)]
        if not self._is_shared:
            return dict(zip(active, own, strict=True))
        owned = [self._of_rank(active, rank) for rank in range(self._cfg.size)]
        gathered: dict[str, Parts] = {}
        for position in range(max(map(len, owned))):
            sent = own[position] if position < len(own) else self._padding(latents)
            received = {part: all_gather(sent[part], self._cfg).unbind() for part in latents}
            for rank, names in enumerate(owned):
                if position < len(names):
                    gathered[names[position]] = {part: tensors[rank] for part, tensors in received.items()}
        return {name: gathered[name] for name in active}

    def _padding(self, latents: Parts) -> Parts:
        """What a rank without a branch sends."""
        return {part: torch.zeros_like(each, dtype=self._dtype) for part, each in latents.items()}

    def _of_rank(self, names: Sequence[str], rank: int) -> list[str]:
        """Those of the names whose branches a rank computes, in order."""
        if not self._is_shared:
            return list(names)
        return [name for name in names if self._names.index(name) % self._cfg.size == rank]

    @property
    def reused(self) -> int:
        """How many of this rank's predictions took the work of most blocks from earlier steps."""
        return sum(branch.reused for branch in self._branches.values())
