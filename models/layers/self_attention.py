"""Self-attention of DiTs, up to the projection of its result. Parameter names are those of Diffusers' checkpoints.

Shapes: B batch, S tokens, D hidden size (of this rank, after tp), K head size.
"""

# ruff: noqa: N803  (the capitals of a tensor's name are its shape)

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from models.layers.attention import Attention, KeyValues
from models.layers.linear import ALL, JoinedLinear, JoinsWeights, Linear, project
from models.layers.norms import RMSNorm
from models.layers.qk_norm import QKNorms, apply_qk_norm, in_place, split_heads
from models.layers.rotary import Rotation

QUERIES, KEYS_AND_VALUES = slice(0, 1), slice(1, 3)


class Started(NamedTuple):
    """Queries, keys and values on their way."""

    queries: Tensor
    key_values: KeyValues


class SelfAttention(JoinsWeights):
    """Tokens attend to each other; queries and keys are normalised, then turned to their positions.

    The norms are over each head, or over all heads together if they are as wide. The block projects the result.
    """

    def __init__(self, size: int, head_size: int, norm_size: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        self.head_size = head_size
        self.to_q = Linear(size, size)
        self.to_k = Linear(size, size)
        self.to_v = Linear(size, size)
        self.norm_q = RMSNorm(norm_size or head_size, eps)
        self.norm_k = RMSNorm(norm_size or head_size, eps)
        self.inner = Attention()
        self.joined: JoinedLinear | None = None

    def join_weights(self) -> None:
        """Make one product of the three projections, once the weights are in place."""
        self.joined = JoinedLinear(self._projections)

    def start(self, x_BSD: Tensor, rotation: Rotation, boundary: int = 0, *, keys_first: bool = False) -> Started:
        """Project and begin to attend: what is computed before finish() overlaps with what ranks send each other.

        Where nothing is, `keys_first` lets at least the queries' projection do so, in a product of its own. The first
        `boundary` tokens are text.
        """
        width = self.to_q.weight.shape[0]
        norms = self._norms()
        if not (keys_first and self.inner.travels):
            qkv = x_BSD.new_empty(*x_BSD.shape[:2], 3 * width)
            self._project(x_BSD, qkv, boundary, ALL)
            key_values = self._send(qkv, norms, rotation, boundary)
            return Started(self.inner.start_queries(split_heads(qkv[..., :width], self.head_size)), key_values)
        kv = x_BSD.new_empty(*x_BSD.shape[:2], 2 * width)
        self._project(x_BSD, kv, boundary, KEYS_AND_VALUES)
        key_values = self._send(kv, norms.of(slice(1, 2)), rotation, boundary)
        q = x_BSD.new_empty(*x_BSD.shape[:2], width)
        self._project(x_BSD, q, boundary, QUERIES)
        apply_qk_norm(q, norms.of(slice(0, 1)), rotation, boundary)
        return Started(self.inner.start_queries(split_heads(q, self.head_size)), key_values)

    def finish(self, started: Started, out: Tensor | None = None) -> Tensor:
        """(B, S, D), in `out` if given."""
        heads = None if out is None else split_heads(out, self.head_size)
        attended: Tensor = self.inner.finish(*started, heads)
        return attended.flatten(2) if out is None else out

    def _send(self, x: Tensor, norms: QKNorms, rotation: Rotation, boundary: int) -> KeyValues:
        """Normalise and turn what the norms are for; keys and values, the last two parts of x, are then sent."""
        parts = in_place(x, len(norms.image) + 1, self.head_size)
        key_values = self.inner.key_values(*parts[-2:])
        if key_values.room is None:
            without_values = x[..., : -parts[-1].shape[2] * self.head_size]
            apply_qk_norm(without_values, norms, rotation, boundary)
        else:
            apply_qk_norm(x, norms, rotation, boundary, out=(*parts[:-2], *key_values.room))
        key_values.send()
        return key_values

    @property
    def _projections(self) -> tuple[Linear, ...]:
        return self.to_q, self.to_k, self.to_v

    def _project(self, x_BSD: Tensor, out: Tensor, boundary: int, which: slice) -> None:
        """Write queries, keys and values, or some of them, side by side."""
        del boundary  # All tokens are of one stream.
        project(x_BSD, out, self.joined, self._projections, which)

    def _norms(self) -> QKNorms:
        norms = (self.norm_q, self.norm_k)
        return QKNorms(text=norms, image=norms, head_size=self.head_size)
