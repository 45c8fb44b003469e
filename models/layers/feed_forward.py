"""Feed-forwards of transformer blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from models.kernels.activation import gate_by_silu
from models.layers.linear import JoinedLinear, JoinsWeights, Linear, project

Activation = Literal["gelu_tanh", "gelu", "silu"]

_ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "gelu": gelu,
    "silu": silu,
}


class _Projection(nn.Module):
    """The linear layer net.0.proj of Diffusers' checkpoints, with its activation."""

    def __init__(self, size: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.proj = Linear(size, hidden)
        self.activate = _ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.proj(x))


class FeedForward(nn.Module):
    """Linear, activation, linear. The parameters are net.0.proj and net.2.

    Defaults: the hidden size is 4 * `size`, `out_size` is `size`, the activation is GELU (tanh approximation).
    """

    def __init__(
        self,
        size: int,
        hidden: int | None = None,
        out_size: int | None = None,
        activation: Activation = "gelu_tanh",
    ) -> None:
        super().__init__()
        hidden = hidden or 4 * size
        # Index 1 is a dropout in Diffusers; it gives the second linear layer the name net.2.
        self.net = nn.Sequential(_Projection(size, hidden, activation), nn.Identity(), Linear(hidden, out_size or size))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, size) to (batch, tokens, out_size)."""
        result: Tensor = self.net(x)
        return result

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the result to `out` (batch, tokens, out_size). The activation must be "gelu_tanh"."""
        first, _, last = self.net
        assert isinstance(first, _Projection), "__init__ sets the layers of net"
        assert isinstance(last, Linear), "__init__ sets the layers of net"
        hidden = x.new_empty(*x.shape[:2], first.proj.weight.shape[0])
        first.proj.gelu_into(x, hidden)
        last.into(hidden, out)


class GatedFeedForward(JoinsWeights):
    """SwiGLU feed-forward without biases, w2(SiLU(w1(x)) * w3(x)).

    Parameter names are those of Meta's Llama checkpoints.
    """

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(size, hidden, has_bias=False)
        self.w2 = Linear(hidden, size, has_bias=False)
        self.w3 = Linear(size, hidden, has_bias=False)
        self.joined: JoinedLinear | None = None

    def join_weights(self) -> None:
        """Join w1 and w3 into one GEMM. The weights must be loaded."""
        self.joined = JoinedLinear((self.w1, self.w3))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, size) to (batch, tokens, size)."""
        hidden = x.new_empty(*x.shape[:2], 2 * len(self.w1.weight))
        project(x, hidden, self.joined, (self.w1, self.w3))
        result: Tensor = self.w2(gate_by_silu(hidden))
        return result
