"""Linear layers in float8: rounding errors, supported layers, and refused devices and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear
from torch.torch_version import TorchVersion

from common.errors import FailedPrecondition, InvalidInput
from configs.approximation import Approximation
from models.kernels.float8 import (
    check_float8,
    check_sizes,
    float8_linear,
    quantize_rows,
    scaled_multiply,
)
from models.kernels.float8_format import FLOAT8, LARGEST
from models.layers.linear import JoinedLinear, Linear, project, quantize_linears
from models.loader import numerics_fingerprint
from models.parallel import tensor_parallel
from models.parallel.mesh import Axis
from models.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
IN, OUT = 64, 48


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def dequantized(values: Tensor, scale: Tensor) -> Tensor:
    return values.float() * scale.view(-1, 1)


def reference_linear(x: Tensor, layer: Linear) -> Tensor:
    """Reference result of a quantized layer: GEMM of dequantized rows and dequantized weight."""
    assert layer.scale is not None
    rows = dequantized(*quantize_rows(x.flatten(0, -2))).view(x.shape)
    return linear(rows, dequantized(layer.weight, layer.scale), layer.bias)


def test_rounding_errors_are_at_most_half_a_step() -> None:
    """Three mantissa bits: half a step is at most 1/16 of a normal number.

    Subnormal numbers have steps of 2**-9 times the row's scale.
    """
    x = torch.randn(32, 256) * torch.logspace(-3, 3, 32)[:, None]
    values, scale = quantize_rows(x)
    assert (values.dtype, scale.dtype, scale.shape) == (FLOAT8, torch.float32, (32, 1))
    bound = torch.maximum(x.abs() / 16, scale * 2**-10) * (1 + 1e-6)
    assert bool(((dequantized(values, scale) - x).abs() <= bound).all())
    assert torch.equal(values.float().abs().amax(-1), torch.full((32,), LARGEST)), "each row must use the whole range"


def test_rows_are_quantized_independently() -> None:
    x = torch.randn(4, 64)
    values, scale = quantize_rows(x)
    alone, own = quantize_rows(x[2:3] * 1024)
    assert torch.equal(alone.float(), values[2:3].float())
    torch.testing.assert_close(own, scale[2:3] * 1024)


def test_zero_rows_stay_zero() -> None:
    values, scale = quantize_rows(torch.zeros(2, 8))
    assert not dequantized(values, scale).any()


def scaled_mm_by_rows(
    x: Tensor, weight: Tensor, *, scale_a: Tensor, scale_b: Tensor, bias: Tensor, out: Tensor, **_: object
) -> None:
    """torch._scaled_mm() with row-wise scales for CPUs; torch before 2.13 has it only for CUDA."""
    out.copy_((x.float() @ weight.float()) * scale_a * scale_b + bias)


def test_scaled_multiply_matches_float8_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU gets the same `_scaled_mm()` call as CUDA: layouts, scales and bias."""
    if TorchVersion(torch.__version__) < "2.13":
        monkeypatch.setattr(torch, "_scaled_mm", scaled_mm_by_rows)
    x, weight = torch.randn(5, IN).bfloat16(), torch.randn(OUT, IN).bfloat16()
    bias = torch.randn(OUT).bfloat16()
    values, scale = quantize_rows(weight)
    got = scaled_multiply(x, values, scale.flatten(), bias, torch.empty(5, OUT, dtype=torch.bfloat16))
    assert relative_error(got, float8_linear(x, values, scale.flatten(), bias)) <= 4e-3


def layers() -> dict[str, Callable[[], Linear]]:
    """Constructors of all kinds of linear layers, on one rank."""
    return {
        "linear": lambda: Linear(IN, OUT),
        "column": lambda: ColumnParallelLinear(IN, (OUT,), Axis()),
        "row": lambda: RowParallelLinear((IN // 4, 3 * IN // 4), OUT, Axis()),
    }


@pytest.mark.parametrize("kind", layers())
def test_methods_of_a_quantized_layer_match_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parallel, "all_reduce", lambda x, _: x)  # One rank needs no process group.
    layer, x = layers()[kind](), torch.randn(2, 5, IN)
    exact = layer(x)
    layer.quantize()
    assert (layer.weight.dtype, layer.weight.shape) == (FLOAT8, (OUT, IN))
    expected = reference_linear(x, layer)
    assert 1e-3 < relative_error(expected, exact) < 5e-2
    torch.testing.assert_close(layer(x), expected)
    out = torch.zeros(2, 7, OUT)
    layer.into(x[:, 1:4], out[:, 1:4])
    layer.gelu_into(x[:, 4:], out[:, 5:6])
    torch.testing.assert_close(out[:, 1:4], expected[:, 1:4])
    torch.testing.assert_close(out[:, 5:6], gelu(expected[:, 4:], approximate="tanh"))
    assert not out[:, 6:].any()
    layer.into(x[:, :0], out[:, :0])
    assert layer(x[:, :0]).shape == (2, 0, OUT)


def test_joined_layers_match_their_parts() -> None:
    each, x = [Linear(IN, OUT) for _ in range(2)], torch.randn(2, 3, IN)
    for layer in each:
        layer.quantize()
    expected = torch.cat([layer(x) for layer in each], dim=-1)
    joined = JoinedLinear(each)
    assert joined.weight.values.dtype == FLOAT8
    assert joined.weight.values.untyped_storage().data_ptr() == each[1].weight.untyped_storage().data_ptr()
    for given in (None, joined):
        out = torch.zeros(2, 3, 2 * OUT)
        project(x, out, given, each)
        torch.testing.assert_close(out, expected)


def test_float8_and_float32_layers_are_not_joined() -> None:
    one, other = Linear(IN, OUT), Linear(IN, OUT)
    one.quantize()
    with pytest.raises(ValueError, match="cannot be joined"):
        JoinedLinear((one, other))


def test_only_named_layers_are_quantized() -> None:
    model = nn.ModuleDict({"a": Linear(IN, OUT), "b": Linear(IN, OUT)})
    quantize_linears(model, ("a",))
    assert (model["a"].weight.dtype, model["b"].weight.dtype) == (FLOAT8, torch.float32)
    assert list(model.state_dict()) == ["a.weight", "a.bias", "b.weight", "b.bias"]


def test_a_device_without_float8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(FailedPrecondition, match=r"compute capability 8\.9 or higher; A100 has 8\.0") as caught:
        check_float8(CUDA, torch.bfloat16)
    assert caught.value.field == "linear_dtype"
    check_float8(CPU, torch.float32)


def test_float32_with_float8_layers_is_refused_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_float8(CUDA, torch.bfloat16)
    with pytest.raises(InvalidInput, match="does not support dtype float32 on CUDA; use dtype bfloat16"):
        check_float8(CUDA, torch.float32)


def test_layer_sizes_must_be_multiples_of_16_on_cuda() -> None:
    check_sizes("a", (32, 48), CUDA)
    check_sizes("a", (32, 50), CPU)
    with pytest.raises(InvalidInput, match=r"multiples of 16; blocks\.0\.a is 32 x 50"):
        check_sizes("blocks.0.a", (32, 50), CUDA)


def test_numerics_fingerprints_depend_on_the_approximation() -> None:
    fingerprints = {
        numerics_fingerprint(CPU, torch.bfloat16, approximation=approximation)
        for approximation in (Approximation(), Approximation("float8"), Approximation(step_cache_threshold=0.1))
    }
    assert len(fingerprints) == 3
    assert numerics_fingerprint(CPU, torch.bfloat16) in fingerprints
