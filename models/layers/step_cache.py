"""Steps that compute the first block only, and take from an earlier step what the other blocks add.

From step to step the blocks' work changes little in long stretches of a request, and how much the first block's part of
it has changed tells how much all of it has: the First Block Cache of ParaAttention, a relative of TeaCache (arXiv
2411.19108). Whether a step is computed is decided on the host, by one number that it reads of each step.

Shapes: B batch, S tokens of this rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.layers.norms import Residual

Block = Callable[[Residual], Residual]


def _unchanged(sums: Tensor) -> Tensor:
    """The sum over one rank."""
    return sums


class StepCache:
    """The last computed step of one branch of one request.

    Tensors stay where they are once they are there, so that CUDA graphs find them. The caller sets `is_filled` once a
    step has been computed: the replay of a graph runs no code here. `sum_over_ranks` adds a float32 tensor over all
    ranks that hold parts of the tokens or weights, so that these make the same decision; by default there is one rank.
    """

    def __init__(self, sum_over_ranks: Callable[[Tensor], Tensor] = _unchanged) -> None:
        self._sum_over_ranks = sum_over_ranks
        self._kept: _Kept | None = None
        self.is_filled = False

    def reset(self) -> None:
        """Forget the steps of the last request; the tensors stay where they are."""
        self.is_filled = False

    def change(self) -> float:
        """How much the first block's part of the step differs from that of the last computed one; waits for it.

        Relative L1 over all tokens.
        """
        assert self._kept is not None, "no step has been computed"
        return float(self._kept.change)

    def keep(self, first: Tensor, rest: Tensor) -> None:
        """Remember what the first block and what all others added to the residual stream, (B, S, D) each."""
        if self._kept is None:
            self._kept = _Kept(first.clone(), rest.clone(), torch.zeros((), device=first.device))
        else:
            self._kept.first.copy_(first)
            self._kept.rest.copy_(rest)

    def reuse(self, first: Tensor) -> Tensor:
        """What the other blocks added (B, S, D), for a step whose first block adds `first`; also finds the change."""
        assert self._kept is not None, "no step has been computed"
        before = self._kept.first.float()
        sums = self._sum_over_ranks(torch.stack(((first.float() - before).abs().sum(), before.abs().sum())))
        self._kept.change.copy_(sums[0] / sums[1])
        return self._kept.rest


class _Kept(NamedTuple):
    first: Tensor
    rest: Tensor
    change: Tensor


class CacheUse(NamedTuple):
    """What a prediction does with a cache: a probe reuses what it holds, any other one computes and fills it."""

    cache: StepCache
    probe: bool


def through_blocks(residual: Residual, blocks: Sequence[Block], use: CacheUse | None) -> Residual:
    """The residual stream after all blocks. With a cache it comes without an update that is still to be added.

    What is computed is the same to the bit, with a cache or without.
    """
    if use is None:
        for block in blocks:
            residual = block(residual)
        return residual
    first, *others = blocks
    # Blocks may change what they are given.
    x_BSD = first(residual._replace(x=residual.x.clone())).added()  # noqa: N806
    own = x_BSD - residual.x
    if use.probe:
        return Residual(x_BSD + use.cache.reuse(own))
    residual = Residual(x_BSD.clone())
    for block in others:
        residual = block(residual)
    end_BSD = residual.added()  # noqa: N806
    use.cache.keep(own, end_BSD - x_BSD)
    return Residual(end_BSD)
