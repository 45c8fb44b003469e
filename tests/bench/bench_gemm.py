"""GEMM shapes of the DiTs, and their computation by this project, nvmath.linalg.advanced and torchao."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from models.kernels.cublas_lt import linear_into
from models.kernels.float8 import float8_linear, quantize_rows

SETS = 2
"""Number of input and weight sets, used alternately; together they exceed the L2 cache."""

GRAPH_SECONDS = 4e-3
"""Approximate GPU time of a graph, in seconds."""

ASSUMED_FLOPS = 6e14
"""Assumed GEMM speed in FLOP/s, from which the number of calls in a graph follows."""

ON_GPU: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}

Call = Callable[[int], Tensor]
"""Computes the result (rows, width) of one set by its index."""


@dataclass(frozen=True)
class Shape:
    """A GEMM (rows, size) x (size, width) with bias.

    The result may be a part of a wider tensor, in which `columns` columns precede it.
    """

    name: str
    rows: int
    size: int
    width: int
    gelu: bool = False
    columns: int = 0
    compiled: bool = False

    @property
    def title(self) -> str:
        """Name and sizes of the shape."""
        columns = f", after {self.columns} columns" if self.columns else ""
        return f"{self.name}: {self.rows} x {self.size} -> {self.width}{', GELU' if self.gelu else ''}{columns}"

    @property
    def calls(self) -> int:
        """Number of calls in a graph, a multiple of SETS."""
        return SETS * max(1, round(GRAPH_SECONDS * ASSUMED_FLOPS / (2.0 * SETS * self.rows * self.size * self.width)))


GEMM_SHAPES = (
    Shape("FLUX out", 4608, 3072, 3072),
    Shape("FLUX q, k, v", 4608, 3072, 9216),
    Shape("FLUX MLP", 4608, 3072, 12288, gelu=True),
    Shape("FLUX MLP of a single block", 4608, 3072, 12288, gelu=True, columns=3072),
    Shape("FLUX q, k, v, MLP", 4608, 3072, 21504),
    Shape("FLUX out of a single block", 4608, 15360, 3072),
    Shape("FLUX.2 klein q, k, v, MLP", 4608, 3072, 27648),
    Shape("FLUX.2 klein out", 4608, 12288, 3072),
    Shape("Qwen-Image out", 4296, 3072, 3072),
    Shape("Qwen-Image values", 4296, 3072, 3072, columns=6144),
    Shape("Qwen-Image MLP", 4296, 3072, 12288, gelu=True),
    Shape("Wan 14B out", 32760, 5120, 5120),
    Shape("Wan 14B values", 32760, 5120, 5120, columns=10240),
    Shape("Wan 14B MLP", 32760, 5120, 13824, gelu=True),
)

FLOAT8_SHAPES = (
    Shape("FLUX out", 4608, 3072, 3072),
    Shape("FLUX q, k, v", 4608, 3072, 9216),
    Shape("FLUX q, k, v, MLP", 4608, 3072, 21504),
    Shape("FLUX.2 klein q, k, v, MLP", 4608, 3072, 27648),
    Shape("Qwen-Image out", 4296, 3072, 3072),
    Shape("Wan 14B out", 32760, 5120, 5120),
    Shape("Wan 14B MLP", 32760, 5120, 13824),
)

COMPILED_SHAPES = (
    Shape("FLUX MLP", 4608, 3072, 12288, compiled=True),
    Shape("FLUX out of a single block", 4608, 15360, 3072, compiled=True),
)
"""A short list, as compilation takes seconds."""


class Operands:
    """Inputs, weights and biases of a shape, and a buffer for the result.

    Shapes are (SETS, rows, size), (SETS, width, size) and (SETS, width). A separate generator is used, because a failed
    capture leaves the default generator unusable.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        generator = torch.Generator("cuda").manual_seed(0)
        self.x = torch.randn(SETS, shape.rows, shape.size, generator=generator, **ON_GPU)
        self.weight = torch.randn(SETS, shape.width, shape.size, generator=generator, **ON_GPU) / shape.size**0.5
        self.bias = torch.randn(SETS, shape.width, generator=generator, **ON_GPU)
        self.wide = torch.zeros(shape.rows, shape.columns + shape.width, **ON_GPU)
        self.out = self.wide[:, shape.columns :]

    def of(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and bias of a set."""
        return self.x[index], self.weight[index], self.bias[index]

    def exact(self) -> Tensor:
        """Result of the first set in float32."""
        result = linear(*(each.float() for each in self.of(0)))
        return gelu(result, approximate="tanh") if self.shape.gelu else result

    def error(self, result: Tensor, exact: Tensor) -> float:
        """Relative L2 distance. Raises ArithmeticError if columns before the result were written."""
        if bool(self.wide[:, : self.shape.columns].any()):
            raise ArithmeticError("columns before the result were written")
        return float((result.float() - exact).norm() / exact.norm())


Prepare = Callable[[Operands, ExitStack], Call]
"""Prepares a method for a shape; the stack frees its resources."""


def our_gemm(operands: Operands, _stack: ExitStack) -> Call:
    """linear_into()."""

    def call(index: int) -> Tensor:
        linear_into(*operands.of(index), operands.out, gelu=operands.shape.gelu)
        return operands.out

    return call


def planned_matmul(*, checked: bool = False, workspace: bool = False) -> Prepare:
    """Matmul in place: the transposed result is operand C, the only way to write into columns."""

    def prepare(operands: Operands, stack: ExitStack) -> Call:
        # optional GPU package
        from nvmath.linalg.advanced import Matmul

        x, weight, bias = operands.of(0)
        limit = {} if workspace else {"memory_limit": 0}
        c = operands.out.t()
        matmul = stack.enter_context(Matmul(weight, x.t(), c, beta=0.0, options={"inplace": True, **limit}))
        matmul.plan(epilog=_epilog(operands.shape), epilog_inputs={"bias": bias}, preferences={"limit": 1})
        reset = matmul.reset_operands if checked else matmul.reset_operands_unchecked

        def call(index: int) -> Tensor:
            x, weight, bias = operands.of(index)
            reset(a=weight, b=x.t(), c=operands.out.t(), epilog_inputs={"bias": bias})
            matmul.execute()
            return operands.out

        return call

    return prepare


def matmul_then_copy(operands: Operands, stack: ExitStack) -> Call:
    """Matmul with a newly allocated result, which is copied into the columns."""
    # optional GPU package
    from nvmath.linalg.advanced import Matmul

    x, weight, bias = operands.of(0)
    matmul = stack.enter_context(Matmul(weight, x.t(), options={"memory_limit": 0}))
    matmul.plan(epilog=_epilog(operands.shape), epilog_inputs={"bias": bias}, preferences={"limit": 1})

    def call(index: int) -> Tensor:
        x, weight, bias = operands.of(index)
        matmul.reset_operands_unchecked(a=weight, b=x.t(), epilog_inputs={"bias": bias})
        return operands.out.copy_(matmul.execute().t())

    return call


def _epilog(shape: Shape) -> Any:
    # optional GPU package
    from nvmath.linalg.advanced import MatmulEpilog

    return MatmulEpilog.GELU_BIAS if shape.gelu else MatmulEpilog.BIAS


def bfloat16(operands: Operands, _stack: ExitStack) -> Call:
    """PyTorch's GEMM."""
    return lambda index: linear(*operands.of(index))


def our_float8(operands: Operands, _stack: ExitStack) -> Call:
    """float8_linear()."""
    quantized = [quantize_rows(weight) for weight in operands.weight]

    def call(index: int) -> Tensor:
        values, scale = quantized[index]
        return float8_linear(operands.x[index], values, scale.flatten(), operands.bias[index])

    return call


def torchao_float8(*, per_row: bool, compiled: bool = False) -> Prepare:
    """Linear layers that torchao quantizes, called eagerly or through torch.compile()."""

    def prepare(operands: Operands, _stack: ExitStack) -> Call:
        # optional GPU package
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, PerTensor, quantize_

        granularity = PerRow() if per_row else PerTensor()
        # torch.compile() options are process-wide, and autotuning takes too long here.
        config = Float8DynamicActivationFloat8WeightConfig(granularity=granularity, set_inductor_config=False)
        layers = []
        for weight, bias in zip(operands.weight, operands.bias, strict=True):
            layer = nn.Linear(operands.shape.size, operands.shape.width, device="meta")
            layer.weight, layer.bias = (nn.Parameter(each, requires_grad=False) for each in (weight, bias))
            quantize_(layer, config)
            if not type(layer.weight.data).__module__.startswith("torchao"):
                raise TypeError("torchao did not quantize the weight")
            layers.append(layer)
        run = torch.compile(_apply, dynamic=False, fullgraph=True) if compiled else _apply

        def call(index: int) -> Tensor:
            return run(operands.x[index], layers[index].weight, layers[index].bias)

        return call

    return prepare


def _apply(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(x, weight, bias)


def gemm_methods(shape: Shape) -> Mapping[str, Prepare]:
    """Methods of the first table; this project's method is first."""
    methods = {
        "ours": our_gemm,
        "Matmul": planned_matmul(),
        "Matmul, checked": planned_matmul(checked=True),
        "Matmul, workspace": planned_matmul(workspace=True),
    }
    return methods | ({"Matmul, then copy": matmul_then_copy} if shape.columns else {})


def float8_methods(shape: Shape) -> Mapping[str, Prepare]:
    """Methods of the second table; this project's method is first."""
    methods = {
        "ours": our_float8,
        "torchao, per row": torchao_float8(per_row=True),
        "torchao, per tensor": torchao_float8(per_row=False),
        "bfloat16": bfloat16,
    }
    if shape.compiled:
        methods["torchao, per row, compiled"] = torchao_float8(per_row=True, compiled=True)
        methods["torchao, per tensor, compiled"] = torchao_float8(per_row=False, compiled=True)
    return methods
