"""Linear layers that write their result where it is needed, so that streams and projections need no concatenation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear


class Linear(nn.Linear):
    """torch's linear layer, which can also write into a part of a larger tensor.

    Parallel layers take its place and keep its methods: `weight` is then this rank's part.
    """

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the result (B, tokens, out_features) of x (B, tokens, in_features); both may be parts of others."""
        write_linear(x, self.weight, self.bias, out)

    def gelu_into(self, x: Tensor, out: Tensor) -> None:
        """The same, through GELU in its tanh form."""
        write_linear_gelu(x, self.weight, self.bias, out)


def write_linear(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = x @ weight.T + bias, (B, tokens, features) each, row by row of the batch where those are not adjacent."""
    for x_SK, out_SN in _matrices(x, out):  # noqa: N806
        torch.addmm(bias, x_SK, weight.t(), out=out_SN)


def write_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = gelu(x @ weight.T + bias) with the tanh form of GELU; on CUDA in the matrix product's epilogue."""
    for x_SK, out_SN in _matrices(x, out):  # noqa: N806
        if x.is_cuda:
            torch._addmm_activation(bias, x_SK, weight.t(), use_gelu=True, out=out_SN)
        else:
            out_SN.copy_(gelu(linear(x_SK, weight, bias), approximate="tanh"))


def _matrices(x: Tensor, out: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two as matrices: one pair where batch rows follow on each other, else one for each row of the batch."""
    if len(x) == 1 or (_is_adjacent(x) and _is_adjacent(out)):
        return [(x.view(-1, x.shape[-1]) if _is_adjacent(x) else x[0], out.flatten(0, 1) if len(x) > 1 else out[0])]
    return list(zip(x, out, strict=True))


def _is_adjacent(x: Tensor) -> bool:
    return x.stride(0) == x.shape[1] * x.stride(1)


class JoinedLinear:
    """Several linear layers of one input as one matrix product.

    The layers' own parameters become views of the joined ones, so that names and memory stay as they were.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.weight = torch.cat([layer.weight.data for layer in layers])
        self.bias = torch.cat([layer.bias.data for layer in layers])
        start = 0
        for layer in layers:
            end = start + len(layer.weight)
            layer.weight = nn.Parameter(self.weight[start:end], requires_grad=False)
            layer.bias = nn.Parameter(self.bias[start:end], requires_grad=False)
            start = end

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the results (B, tokens, sum of out_features), side by side in the layers' order."""
        write_linear(x, self.weight, self.bias, out)


def project(x: Tensor, out: Tensor, joined: JoinedLinear | None, layers: Sequence[Linear]) -> None:
    """Write what several layers make of x side by side into `out`: in one product if they were joined."""
    if joined is not None:
        joined.into(x, out)
        return
    for layer, part in zip(layers, out.chunk(len(layers), dim=-1), strict=True):
        layer.into(x, part)


class JoinsWeights(nn.Module, ABC):
    """A module with layers that are joined once their weights are in place."""

    @abstractmethod
    def join_weights(self) -> None:
        """Join them. The parameters stay, as views of what was joined."""


def join_all_weights(model: nn.Module) -> None:
    """Join what a model's modules have to join. Its parameters keep their names, shapes and values."""
    for module in model.modules():
        if isinstance(module, JoinsWeights):
            module.join_weights()
