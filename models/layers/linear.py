"""Linear layers that can write to a slice of a tensor, so that segments need no concatenation."""

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
"""Selects all of the joined layers."""


class Linear(nn.Linear):
    """nn.Linear that can also write to a slice of a larger tensor, and multiply in float8.

    After quantize() `weight` holds float8 values, and `scale` (out_features,) the factor of each row. `has_bias`:
    whether checkpoints have a bias for the layer; if not, the bias is zeros, so that all layers run the same kernels.
    """

    scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, has_bias: bool = True) -> None:
        super().__init__(in_features, out_features)
        self.has_bias = has_bias
        self.register_buffer("scale", None, persistent=False)

    @property
    def scaled_weight(self) -> Weight:
        """The weight with its scale."""
        return Weight(self.weight, self.scale)

    def quantize(self) -> None:
        """Quantize the weights to float8. Joined layers must be joined again afterwards."""
        values, scale = quantize_rows(self.weight.data)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = scale.flatten()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return multiply(x, self.scaled_weight, self.bias)

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the result for x (B, tokens, in_features) to `out` (B, tokens, out_features). Both may be slices."""
        multiply_into(x, self.scaled_weight, self.bias, out)

    def gelu_into(self, x: Tensor, out: Tensor) -> None:
        """Write GELU (tanh approximation) of the result of into() to `out`."""
        multiply_gelu_into(x, self.scaled_weight, self.bias, out)

    def add_gated(self, x: Tensor, inputs: Tensor, gate: SegmentVectors) -> Residual:
        """x + gate * self(inputs), for x (B, S, out_features); in place if a GEMM epilogue can add.

        Otherwise, the result has a pending update. The choice for all segments depends on the last segment only,
        because the other segments often have too few tokens for an epilogue.
        """
        *others, (rows, vector) = gate.used()
        if not try_add_gated(inputs[:, rows], self.scaled_weight, self.bias, vector, x[:, rows]):
            return Residual(x, self(inputs), gate)
        for rows, vector in others:
            onto, segment = x[:, rows], inputs[:, rows]
            if not try_add_gated(segment, self.scaled_weight, self.bias, vector, onto):
                onto.copy_(Residual(onto, self(segment), SegmentVectors.same(vector)).added())
        return Residual(x)


def absent_biases(model: nn.Module) -> frozenset[str]:
    """Names of a model's biases that checkpoints do not contain."""
    linears = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, Linear))
    return frozenset(f"{path}.bias" for path, layer in linears if not layer.has_bias)


def only_linear(layers: nn.ModuleList) -> Linear:
    """The only layer of a list such as to_out, which in Diffusers also holds a dropout."""
    layer = layers[0]
    assert isinstance(layer, Linear)
    return layer


class JoinedLinear:
    """Several linear layers with the same input, computed by one GEMM.

    The parameters of the layers become views of the joined parameters, under unchanged names: after the previous
    parameters are freed, each weight is stored once. Raises ValueError where only some of the layers are in float8.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        scales = [layer.scale for layer in layers if layer.scale is not None]
        if len(scales) not in (0, len(layers)):
            raise ValueError("layers in float8 cannot be joined with layers of another dtype; quantize all or none")
        self.weight = Weight(_joined([layer.weight.data for layer in layers]), torch.cat(scales) if scales else None)
        self.bias = torch.cat([layer.bias.data for layer in layers])
        self._ends = list(accumulate((len(layer.weight) for layer in layers), initial=0))
        for layer, (start, end) in zip(layers, pairwise(self._ends), strict=True):
            layer.weight = nn.Parameter(self.weight.values[start:end], requires_grad=False)
            layer.bias = nn.Parameter(self.bias[start:end], requires_grad=False)

    def into(self, x: Tensor, out: Tensor, which: slice = ALL) -> None:
        """Write the results of the layers `which`, concatenated, to `out` (B, tokens, sum of out_features)."""
        multiply_into(x, *self.of(which), out)

    def tensors(self) -> tuple[Tensor, ...]:
        """The joined weights, float8 scales if there are any, and biases."""
        return tuple(each for each in (*self.weight, self.bias) if each is not None)

    def of(self, which: slice) -> tuple[Weight, Tensor]:
        """Weight and bias of the adjacent layers `which`."""
        first, *_, end = self._ends[which.start or 0 : None if which.stop is None else which.stop + 1]
        scale = None if self.weight.scale is None else self.weight.scale[first:end]
        return Weight(self.weight.values[first:end], scale), self.bias[first:end]


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """The weights, concatenated along the rows."""
    if weights[0].dtype != FLOAT8:
        return torch.cat(list(weights))
    # Not every device can concatenate float8; every device can concatenate bytes.
    return torch.cat([weight.view(torch.uint8) for weight in weights]).view(FLOAT8)


def project(x: Tensor, out: Tensor, joined: JoinedLinear | None, layers: Sequence[Linear], which: slice = ALL) -> None:
    """Write the results of `layers[which]` for x, concatenated, to `out`, by one GEMM if they are joined."""
    if joined is not None:
        joined.into(x, out, which)
        return
    chosen = layers[which]
    for layer, part in zip(chosen, out.chunk(len(chosen), dim=-1), strict=True):
        layer.into(x, part)


class JoinsWeights(nn.Module, ABC):
    """A module that joins some of its linear layers after their weights are loaded."""

    @abstractmethod
    def join_weights(self) -> None:
        """Join the layers. Their parameters become views of the joined parameters."""


def join_all_weights(model: nn.Module) -> None:
    """Join the layers of all modules of a model. Parameters keep their names, shapes and values."""
    for module in model.modules():
        if isinstance(module, JoinsWeights):
            module.join_weights()


def quantize_linears(model: nn.Module, patterns: Sequence[str]) -> None:
    """Quantize the weights of linear layers with a matching path to float8, and join the layers again.

    The previous weights of a layer are freed before the next layer is quantized; joined weights are freed at the end.
    Raises InvalidInput for sizes that the device's float8 GEMM does not support.
    """
    for path, layer in model.named_modules():
        if any(matches(path, pattern) for pattern in patterns):
            assert isinstance(layer, Linear), f"{path} is {type(layer).__name__}"
            check_sizes(path, layer.weight.shape, layer.weight.device)
            layer.quantize()
    join_all_weights(model)
