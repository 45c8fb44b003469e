"""Step cache: a step may compute only the first block, and reuse the contribution of the other blocks.

This is the First Block Cache of ParaAttention, which is similar to TeaCache (arXiv 2411.19108). The contribution of
blocks is the output of the last block minus the input of the first block. Contributions often change little between
consecutive steps, and the change of the first block's contribution is an estimate of the change of the other blocks'
contribution. The host reads this change, one number per step, and decides whether to compute all blocks.

Shapes: B batch, S tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.layers.norms import Residual

Block = Callable[[Residual], Residual]


def _identity(sums: Tensor) -> Tensor:
    return sums


class StepCache:
    """Contributions from the last completely computed step of one guidance branch of a request.

    Tensors are allocated once and keep their addresses, which captured CUDA graphs require. The caller sets `is_filled`
    after a computed step, since the replay of a graph does not run this code. `reduce_sums` all-reduces a float32
    tensor over the ranks that compute the branch together, so that they make the same decision; by default it is the
    identity.
    """

    def __init__(self, reduce_sums: Callable[[Tensor], Tensor] = _identity) -> None:
        self._reduce_sums = reduce_sums
        self._stored: _StoredStep | None = None
        self.is_filled = False

    def reset(self) -> None:
        """Discard the step of the last request; the tensors keep their addresses."""
        self.is_filled = False

    def change(self) -> float:
        """Relative L1 change of the first block's contribution since the stored step. Waits for the device."""
        assert self._stored is not None, "no step has been computed"
        return float(self._stored.change)

    def store(self, first: Tensor, rest: Tensor) -> None:
        """Store the contribution of the first block, and the contribution of the other blocks, (B, S, D) each."""
        if self._stored is None:
            self._stored = _StoredStep(first.clone(), rest.clone(), torch.zeros((), device=first.device))
        else:
            self._stored.first.copy_(first)
            self._stored.rest.copy_(rest)

    def reuse(self, first: Tensor) -> Tensor:
        """The stored contribution (B, S, D) of the other blocks. `first` is the first block's current contribution.

        Computes the value of change().
        """
        assert self._stored is not None, "no step has been computed"
        before = self._stored.first.float()
        sums = self._reduce_sums(torch.stack(((first.float() - before).abs().sum(), before.abs().sum())))
        self._stored.change.copy_(sums[0] / sums[1])
        return self._stored.rest


class _StoredStep(NamedTuple):
    first: Tensor
    rest: Tensor
    change: Tensor


class CacheUse(NamedTuple):
    """Use of a step cache by a prediction. `probe`: compute only the first block, and reuse the stored contribution."""

    cache: StepCache
    probe: bool


def run_blocks(residual: Residual, blocks: Sequence[Block], use: CacheUse | None) -> Residual:
    """The residual stream after all blocks; with a step cache it has no pending update.

    A computed step is bit-identical with and without a cache.
    """
    if use is None:
        for block in blocks:
            residual = block(residual)
        return residual
    first, *others = blocks
    # Blocks may modify their input in place.
    x_BSD = first(residual._replace(x=residual.x.clone())).added()  # noqa: N806
    added = x_BSD - residual.x
    if use.probe:
        return Residual(x_BSD + use.cache.reuse(added))
    residual = Residual(x_BSD.clone())
    for block in others:
        residual = block(residual)
    end_BSD = residual.added()  # noqa: N806
    use.cache.store(added, end_BSD - x_BSD)
    return Residual(end_BSD)
