"""Guided predictions with some of the contrast of unguided ones."""

from __future__ import annotations

from torch import Tensor


def rescaled(guided: Tensor, unguided: Tensor, share: float) -> Tensor:
    """The guided prediction, of which `share` gets the standard deviation of the unguided one, row by row.

    Both are (B, ...). A share of 0 changes nothing.
    """
    if share <= 0:
        return guided
    other = guided * (_deviation(unguided) / _deviation(guided))
    return share * other + (1 - share) * guided


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation of each row of a batch, in its shape but for sizes of 1."""
    return x.std(dim=list(range(1, x.ndim)), keepdim=True)
