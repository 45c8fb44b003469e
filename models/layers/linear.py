"""Linear layers that write their result where it is needed, so that streams and projections need no concatenation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from models.kernels import fused_products
from models.kernels.activation import write_gelu
from models.kernels.cublas_lt import can_multiply, linear_into
from models.kernels.float8 import FLOAT8, check_sizes, float8_linear, quantize_rows, write_float8_linear
from models.layers.module_paths import matches
from models.layers.norms import Residual, SegmentVectors

ALL = slice(None)


class Weight(NamedTuple):
    """What a layer multiplies with: values (N, K), and where these are float8 the float32 scale (N,) of each row."""

    values: Tensor
    scale: Tensor | None = None


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
        return apply_linear(x, self.factor, self.bias)

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the result (B, tokens, out_features) of x (B, tokens, in_features); both may be parts of others."""
        write_linear(x, self.factor, self.bias, out)

    def gelu_into(self, x: Tensor, out: Tensor) -> None:
        """The same, through GELU in its tanh form."""
        write_linear_gelu(x, self.factor, self.bias, out)

    def update(self, stream: Tensor, x: Tensor, gate: SegmentVectors, boundary: int = 0) -> Residual:
        """A stream with gate * the result, added in place where the GEMM can.

        With two gates, the first is that of the first `boundary` tokens: often too few for a fused GEMM, so that the
        other tokens decide. A third one is not supported.
        """
        assert gate.last is None, "the GEMM adds to two segments"
        if not boundary or gate.text is gate.image:
            return Residual(stream) if self._add(stream, x, gate.image) else Residual(stream, self(x), gate)
        if not self._add(stream[:, boundary:], x[:, boundary:], gate.image):
            return Residual(stream, self(x), gate)
        first_BLN, first_BLK = stream[:, :boundary], x[:, :boundary]  # noqa: N806
        if not self._add(first_BLN, first_BLK, gate.text):
            first_BLN.copy_(Residual(first_BLN, self(first_BLK), SegmentVectors.same(gate.text)).added(0))
        return Residual(stream)

    def _add(self, stream: Tensor, x: Tensor, gate_BN: Tensor) -> bool:  # noqa: N803
        """Add gate * the result to all tokens of the stream in place, if the GEMM can; whether it did."""
        pairs = list(zip(x, stream, strict=True))
        if self.scale is not None or not all(fused_products.can_add(each, self.weight, onto) for each, onto in pairs):
            return False
        for (x_SK, onto_SN), gate_N in zip(pairs, gate_BN, strict=True):  # noqa: N806
            fused_products.add_gated(x_SK, self.weight, self.bias, gate_N, onto_SN)
        return True


def absent_biases(model: nn.Module) -> frozenset[str]:
    """The names of a model's biases that checkpoints do not have."""
    linears = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, Linear))
    return frozenset(f"{path}.bias" for path, layer in linears if not layer.has_bias)


def only_linear(layers: nn.ModuleList) -> Linear:
    """The layer of a list that checkpoints have for the sake of the dropout behind it."""
    layer = layers[0]
    assert isinstance(layer, Linear)
    return layer


def apply_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, (..., K) to (..., N)."""
    if weight.scale is not None:
        return float8_linear(x, weight.values, weight.scale, bias)
    if bias is not None and x.is_contiguous() and can_multiply(rows := x.flatten(0, -2), weight.values):
        result = x.new_empty(len(rows), len(weight.values))
        linear_into(rows, weight.values, bias, result)
        return result.view(*x.shape[:-1], -1)
    return linear(x, weight.values, bias)


def write_linear(x: Tensor, weight: Weight, bias: Tensor, out: Tensor) -> None:
    """out = x @ weight.T + bias, (B, tokens, features) each, row by row of the batch where those are not adjacent."""
    for x_SK, out_SN in _matrices(x, out):  # noqa: N806
        if weight.scale is not None:
            write_float8_linear(x_SK, weight.values, weight.scale, bias, out_SN)
        elif can_multiply(x_SK, weight.values, out_SN):
            linear_into(x_SK, weight.values, bias, out_SN)
        else:
            torch.addmm(bias, x_SK, weight.values.t(), out=out_SN)


def write_linear_gelu(x: Tensor, weight: Weight, bias: Tensor, out: Tensor) -> None:
    """out = gelu(x @ weight.T + bias) with the tanh form of GELU; on CUDA in the matrix product's epilogue.

    QuACK's computes it beside other tiles' products, cuBLASLt's behind its own. Products of float8 have no such
    epilogue, and PyTorch's none that writes into columns of a wider tensor.
    """
    for x_SK, out_SN in _matrices(x, out):  # noqa: N806
        if weight.scale is None and fused_products.can_fuse(x_SK, weight.values, out_SN):
            fused_products.gelu_into(x_SK, weight.values, bias, out_SN)
        elif weight.scale is None and can_multiply(x_SK, weight.values, out_SN):
            linear_into(x_SK, weight.values, bias, out_SN, gelu=True)
        elif weight.scale is None and x.is_cuda and out_SN.is_contiguous():
            torch._addmm_activation(bias, x_SK, weight.values.t(), use_gelu=True, out=out_SN)
        else:
            write_gelu(apply_linear(x_SK[None], weight, bias), out_SN[None])


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
        write_linear(x, *self.of(which), out)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that the products read: weights, biases, and scales where there are any."""
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
    """Write what some of several layers make of x side by side into `out`: in one product if they were joined."""
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

    A layer's former weights are freed before the next one's turn, but for those that are joined with others, which are
    freed at the end. Raises InvalidInput for sizes that the device's products do not take.
    """
    for path, layer in model.named_modules():
        if any(matches(path, pattern) for pattern in patterns):
            assert isinstance(layer, Linear), f"{path} is {type(layer).__name__}"
            check_sizes(path, layer.weight.shape, layer.weight.device)
            layer.quantize()
    join_all_weights(model)
