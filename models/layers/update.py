"""Adds to a residual stream what layers make of it: in their products where these can, else with the next norm.

Shapes: B batch, S tokens, the first `boundary` of them text, D hidden size, K what a layer takes.
"""

# ruff: noqa: N803  (the capitals of a tensor's name are its shape)

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from models.layers.norms import Residual, Streams


class Updating(Protocol):
    """A layer, (B, tokens, K) to (B, tokens, D), whose result is an update of the residual stream."""

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the result into `out`."""

    def can_add(self, x: Tensor, onto: Tensor) -> bool:
        """Whether add_gated() is for these."""

    def add_gated(self, x: Tensor, gate: Tensor, onto: Tensor) -> None:
        """Add the result, times gate (B, D), in place."""


def updated(
    x_BSD: Tensor, given: Tensor, gate: Streams, layers: tuple[Updating, Updating], boundary: int = 0
) -> Residual:
    """x + gate * what the layers, the text's first, make of `given` (B, S, K).

    An update of which a part is in x already, which it then changes, is that of the text alone.
    """
    text, image = layers
    rows = slice(boundary, None)
    is_added = image.can_add(given[:, rows], x_BSD[:, rows])
    update = x_BSD.new_empty(len(x_BSD), boundary if is_added else x_BSD.shape[1], x_BSD.shape[2])
    if boundary:
        text.into(given[:, :boundary], update[:, :boundary])
    if is_added:
        image.add_gated(given[:, rows], gate.image, x_BSD[:, rows])
    else:
        image.into(given[:, rows], update[:, rows])
    return Residual(x_BSD, update, gate) if update.shape[1] else Residual(x_BSD)
