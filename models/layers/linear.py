"""Linear layers that write their result where it is needed, so that streams and projections need no concatenation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from models.kernels.float8 import check_sizes, quantize_rows
from models.kernels.float8_format import FLOAT8
from models.kernels.gemm import Weight, multiply, multiply_gelu_into, multiply_into, try_add_gated
from models.layers.module_paths import matches
from models.layers.norms import Residual
from models.token_segments import SegmentVectors

ALL = slice(None)


class Linear(nn.Linear):
    """torch's linear layer, which can also write into a part of a larger tensor, and multiply in float8.

    Parallel layers take its place and keep its methods: `weight` is then this rank's part. After quantize() `weight`
    holds float8 numbers, to be multiplied by `scale`. `has_bias`: whether checkpoints have a bias of the layer; zeros
    take the place of an absent one, so that all layers are computed alike.
    """

    scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, has_bias: bool = True) -> None:
        super().__init__(in_features, out_features)
        self.has_bias = has_bias
        self.register_buffer("scale", None, persistent=False)

    @property
    def factor(self) -> Weight:
        """The weight with its scale."""
        return Weight(self.weight, self.scale)

    def quantize(self) -> None:
        """Keep the weights in float8 only. A layer that was joined with others must be joined anew."""
        values, scale = quantize_rows(self.weight.data)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = scale.flatten()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return multiply(x, self.factor, self.bias)

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the result (B, tokens, out_features) of x (B, tokens, in_features); both may be parts of others."""
        multiply_into(x, self.factor, self.bias, out)

    def gelu_into(self, x: Tensor, out: Tensor) -> None:
        """The same, through GELU in its tanh form."""
        multiply_gelu_into(x, self.factor, self.bias, out)

    def update(self, stream: Tensor, x: Tensor, gate: SegmentVectors) -> Residual:
        """A stream with gate * the result, added in place where the GEMM's epilogue can.

        The last segment decides: the others often have too few tokens for the epilogue.
        """
        *others, (rows, vector) = gate.used()
        if not try_add_gated(x[:, rows], self.factor, self.bias, vector, stream[:, rows]):
            return Residual(stream, self(x), gate)
        for rows, vector in others:
            stream_BLN, x_BLK = stream[:, rows], x[:, rows]  # noqa: N806
            if not try_add_gated(x_BLK, self.factor, self.bias, vector, stream_BLN):
                stream_BLN.copy_(Residual(stream_BLN, self(x_BLK), SegmentVectors.same(vector)).added())
        return Residual(stream)


def absent_biases(model: nn.Module) -> frozenset[str]:
    """The names of a model's biases that checkpoints do not have."""
    linears = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, Linear))
    return frozenset(f"{path}.bias" for path, layer in linears if not layer.has_bias)


def only_linear(layers: nn.ModuleList) -> Linear:
    """The layer of a list that checkpoints have for the sake of the dropout behind it."""
    layer = layers[0]
    assert isinstance(layer, Linear)
    return layer


class JoinedLinear:
    """Several linear layers of one input as one GEMM.

    The layers' own parameters become views of the joined ones, so that names and memory stay as they were.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        scales = [layer.scale for layer in layers if layer.scale is not None]
        if len(scales) not in (0, len(layers)):
            raise ValueError("layers in float8 cannot be joined with others")
        self.weight = Weight(_joined([layer.weight.data for layer in layers]), torch.cat(scales) if scales else None)
        self.bias = torch.cat([layer.bias.data for layer in layers])
        self._ends = list(accumulate((len(layer.weight) for layer in layers), initial=0))
        for layer, (start, end) in zip(layers, pairwise(self._ends), strict=True):
            layer.weight = nn.Parameter(self.weight.values[start:end], requires_grad=False)
            layer.bias = nn.Parameter(self.bias[start:end], requires_grad=False)

    def into(self, x: Tensor, out: Tensor, which: slice = ALL) -> None:
        """Write the results (B, tokens, sum of out_features), side by side in the layers' order, of some layers."""
        multiply_into(x, *self.of(which), out)

    def tensors(self) -> tuple[Tensor, ...]:
        """Weights, biases, and scales where there are any."""
        return tuple(each for each in (*self.weight, self.bias) if each is not None)

    def of(self, which: slice) -> tuple[Weight, Tensor]:
        """Weight and bias of some layers that follow on each other."""
        first, *_, end = self._ends[which.start or 0 : None if which.stop is None else which.stop + 1]
        scale = None if self.weight.scale is None else self.weight.scale[first:end]
        return Weight(self.weight.values[first:end], scale), self.bias[first:end]


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """Rows behind each other; those of float8 as the bytes that they are, which every device can join."""
    if weights[0].dtype != FLOAT8:
        return torch.cat(list(weights))
    return torch.cat([weight.view(torch.uint8) for weight in weights]).view(FLOAT8)


def project(x: Tensor, out: Tensor, joined: JoinedLinear | None, layers: Sequence[Linear], which: slice = ALL) -> None:
    """Write what some of several layers make of x side by side into `out`: in one GEMM if they were joined."""
    if joined is not None:
        joined.into(x, out, which)
        return
    chosen = layers[which]
    for layer, part in zip(chosen, out.chunk(len(chosen), dim=-1), strict=True):
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


def quantize_linears(model: nn.Module, patterns: Sequence[str]) -> None:
    """Put the weights of the linear layers whose path matches into float8, and join anew what is joined.

    A layer's former weights are freed before the next layer is quantized, except joined weights, which are freed at
    the end. Raises InvalidInput for sizes that the device's float8 GEMM does not take.
    """
    for path, layer in model.named_modules():
        if any(matches(path, pattern) for pattern in patterns):
            assert isinstance(layer, Linear), f"{path} is {type(layer).__name__}"
            check_sizes(path, layer.weight.shape, layer.weight.device)
            layer.quantize()
    join_all_weights(model)
