"""Time and energy of a step's GEMMs and attention on a GPU at its power limit.

A GPU at its power limit lowers its clock rate: the time of a step is then the energy of its kernels divided by the
limit, and launch gaps or idle multiprocessors hardly matter. Operands are random bfloat16 values at the sizes of a Flux
step, if not stated otherwise. Errors are relative L2 against float32.

Run it with: python tests/bench/kernel_energy.py; it needs a GPU with an NVML energy counter
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bench_report import print_machine, print_table, say
from torch import Tensor
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from models.kernels import quack_gemm
from models.kernels.activation import write_gelu
from models.kernels.attention_backends import flash_attention_3, flash_attention_3_into
from models.kernels.cublas_lt import linear_into
from models.kernels.gemm_support import HEAD_SIZE
from models.kernels.trials import try_packages
from models.layers.norms import RMSNorm
from models.layers.qk_norm import QKNormModules, apply_qk_norm
from models.layers.rotary import rotary_embedding

ROWS, SIZE = 4608, 3072
"""Number of tokens, and hidden size."""

HEAD = HEAD_SIZE

SETS = 4
"""Number of input and weight sets, used alternately so that none stays in the L2 cache."""

WARM_UP_SECONDS = 6.0

ON_GPU: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """One operation: `run` takes the index of a set, `exact` returns the float32 result of the first set."""

    name: str
    flops: float
    run: Callable[[int], Tensor]
    exact: Callable[[], Tensor]

    def error(self) -> float:
        """Relative L2 error of the first set's result."""
        result, exact = self.run(0).float(), self.exact()
        return float((result.view_as(exact) - exact).norm() / exact.norm())


class EnergyCounter:
    """Reads the energy that the first GPU has used since its driver was loaded."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._check(self._library.nvmlInit_v2())
        self._check(self._library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device)))

    def joules(self) -> float:
        """Energy in J; the counter is updated about ten times a second."""
        value = ctypes.c_ulonglong()
        self._check(self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(value)))
        return value.value / 1e3

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"the driver does not report energy: NVML status {status}")


@torch.inference_mode()
def main() -> None:
    """Measure all operations and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="run time of each operation")
    args = parser.parse_args()
    print_machine("GEMMs and attention of a Flux step at the power limit")
    say(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    say()
    try_packages(torch.device("cuda", torch.cuda.current_device()))
    counter = EnergyCounter()
    made = (feed_forward, heads, out, gated, attending)
    rows: list[tuple[object, ...]] = []
    for make in made:
        works = make()
        if not rows:
            heat(works[0], WARM_UP_SECONDS)
        for work in works:
            seconds, watts = measure(work, counter, args.seconds)
            speed = work.flops / seconds / 1e12
            joules = watts * seconds
            cells = (f"{speed:.0f}", f"{watts:.0f}", f"{1e3 * joules:.0f}", f"{1e12 * joules / work.flops:.2f}")
            rows.append((work.name, 1e6 * seconds, *cells, f"{work.error():.1e}"))
        del works, work
        torch.cuda.empty_cache()
    print_table(("", "us", "TFLOP/s", "W", "mJ per call", "pJ/FLOP", "error"), rows)


class Operands:
    """Inputs (SETS, rows, size), weights (SETS, width, size), a bias (width,), and a result buffer."""

    def __init__(self, rows: int, width: int, size: int) -> None:
        self.x = torch.randn(SETS, rows, size, **ON_GPU)
        self.weight = torch.randn(SETS, width, size, **ON_GPU) / size**0.5
        self.bias = torch.randn(width, **ON_GPU)
        self.out = torch.empty(rows, width, **ON_GPU)
        self.flops = 2.0 * rows * width * size

    def of(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and bias of a set."""
        return self.x[index], self.weight[index], self.bias

    def by_torch(self, index: int) -> Tensor:
        """PyTorch's GEMM."""
        return linear(*self.of(index))

    def exact(self) -> Tensor:
        """Float32 result of the first set."""
        return linear(*(each.float() for each in self.of(0)))


def feed_forward() -> list[Work]:
    """Feed-forward GEMM of a single block with GELU, written into the columns after the attention output."""
    given = Operands(ROWS, 4 * SIZE, SIZE)
    columns = torch.empty(1, ROWS, 5 * SIZE, **ON_GPU)[..., SIZE:]

    def in_two_passes(index: int) -> Tensor:
        x, weight, bias = given.of(index)
        torch.addmm(bias, x, weight.t(), out=given.out)
        write_gelu(given.out[None], columns)
        return columns

    def by_cublas(index: int) -> Tensor:
        linear_into(*given.of(index), columns[0], gelu=True)
        return columns

    def fused(index: int) -> Tensor:
        quack_gemm.gelu_into(*given.of(index), columns[0])
        return columns

    def exact() -> Tensor:
        return gelu(given.exact(), approximate="tanh")[None]

    return [
        Work("feed-forward without GELU", given.flops, given.by_torch, given.exact),
        Work("feed-forward, then GELU", given.flops, in_two_passes, exact),
        Work("feed-forward with GELU, cuBLASLt", given.flops, by_cublas, exact),
        Work("feed-forward with GELU, QuACK", given.flops, fused, exact),
    ]


def heads() -> list[Work]:
    """Query, key and value GEMMs with norms and RoPE."""
    given = Operands(ROWS, 3 * SIZE, SIZE)
    norms = (RMSNorm(HEAD).to(**ON_GPU), RMSNorm(HEAD).to(**ON_GPU))
    qk_norms = QKNormModules(norms, HEAD)
    rotation = rotary_embedding(torch.arange(ROWS, device="cuda")[:, None], (HEAD,))
    out, normed = given.out, 2 * SIZE
    scale = torch.ones(normed, **ON_GPU)

    def in_two_passes(index: int) -> Tensor:
        linear_into(*given.of(index), out)
        apply_qk_norm(out[None, :, :normed], qk_norms, rotation)
        return out

    def fused(index: int) -> Tensor:
        x, weight, bias = given.of(index)
        quack_gemm.normed_heads_into(x, weight[:normed], bias[:normed], scale, rotation.interleaved, out[:, :normed])
        linear_into(x, weight[normed:], bias[normed:], out[:, normed:])
        return out

    def exact() -> Tensor:
        result = given.exact()
        apply_qk_norm(result[None, :, :normed], qk_norms, rotation)
        return result

    return [
        Work("queries, keys, values", given.flops, given.by_torch, given.exact),
        Work("queries, keys, values, then norms and RoPE", given.flops, in_two_passes, exact),
        Work("queries, keys, values with norms and RoPE, QuACK", given.flops, fused, exact),
    ]


def out() -> list[Work]:
    """Output GEMM of a single block, by PyTorch and by cuBLASLt without a workspace."""
    given = Operands(ROWS, SIZE, 5 * SIZE)

    def by_cublas(index: int) -> Tensor:
        linear_into(*given.of(index), given.out)
        return given.out

    return [
        Work("output projection", given.flops, given.by_torch, given.exact),
        Work("output projection, cuBLASLt", given.flops, by_cublas, given.exact),
    ]


def gated() -> list[Work]:
    """Gated update of Wan2.1-1.3B's residual stream, added to zeros.

    The times of both methods include the pass that fills the tensor with zeros.
    """
    given = Operands(32760, 1536, 1536)
    gate = torch.randn(1536, **ON_GPU)

    def in_two_passes(index: int) -> Tensor:
        return given.out.zero_().addcmul_(given.by_torch(index), gate)

    def fused(index: int) -> Tensor:
        quack_gemm.add_gated(*given.of(index), gate, given.out.zero_())
        return given.out

    def exact() -> Tensor:
        return given.exact() * gate.float()

    return [
        Work("Wan's output projection, then gate", given.flops, in_two_passes, exact),
        Work("Wan's output projection with gate, QuACK", given.flops, fused, exact),
    ]


def attending() -> list[Work]:
    """Attention of all queries, and of half as on one of two GPUs, in one call and with heads split."""
    works = []
    for queries in (ROWS, ROWS // 2):
        q, k, v = (torch.randn(SETS, 1, tokens, 24, 128, **ON_GPU) for tokens in (queries, ROWS, ROWS))
        whole = partial(attend, flash_attention_3, q, k, v)
        into = partial(attend_into, torch.empty_like(q[0]), q, k, v)
        exact = partial(attend_exactly, q[0], k[0], v[0])
        flops = 4.0 * queries * ROWS * SIZE
        works.append(Work(f"attention, {queries} queries", flops, whole, exact))
        works.append(Work(f"attention, {queries} queries, heads split", flops, into, exact))
    return works


def attend(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, index: int) -> Tensor:
    """Attend to one set of keys and values."""
    return function(q[index], k[index], v[index])


def attend_into(out: Tensor, q: Tensor, k: Tensor, v: Tensor, index: int) -> Tensor:
    """Attend to one set, into an existing tensor."""
    flash_attention_3_into(q[index], k[index], v[index], out=out)
    return out


def attend_exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float32."""
    q, k, v = (each.float().transpose(1, 2) for each in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def heat(work: Work, seconds: float) -> None:
    """Run the operation for `seconds`, to reach the power limit."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        some_calls(work, 100)


def some_calls(work: Work, calls: int) -> None:
    """Run `calls` calls and synchronize."""
    for index in range(calls):
        work.run(index % SETS)
    torch.cuda.synchronize()


def measure(work: Work, counter: EnergyCounter, seconds: float) -> tuple[float, float]:
    """Seconds per call, and average power in W. The counter's 0.1 s resolution adds a few percent of error."""
    some_calls(work, 100)
    calls, began, joules = 0, time.perf_counter(), counter.joules()
    while (elapsed := time.perf_counter() - began) < seconds:
        some_calls(work, 100)
        calls += 100
    return elapsed / calls, (counter.joules() - joules) / elapsed


if __name__ == "__main__":
    main()
