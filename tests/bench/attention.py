"""Benchmark of attention backends by shape on a GPU; source of models/kernels/attention_table.py.

Keys and values are strided views of one bfloat16 tensor, as in the models; the head size is 128. Backends alternate in
every round, so that all run at the same clock rate. A figure is the median of the rounds, with minimum and maximum.
Errors are relative L2 against float32 attention, for results and log-sum-exp. A backend that is not installed or does
not support a shape is shown as "-", with its error below the tables.

Run it with: python tests/bench/attention.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from bench_device import milliseconds
from bench_report import print_machine, print_table, say
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from models.kernels import attention_backends as backends
from models.kernels.attention_table import choose_backend
from models.kernels.packages import PACKAGES, PackageName

HEAD_SIZE = 128

SHAPES = (
    ("Flux 1024x1024", 24, 4608, 4608),
    ("Flux, ulysses 2", 12, 4608, 4608),
    ("Flux, ring 2", 24, 2304, 4608),
    ("Flux, one block of ring 2", 24, 2304, 2304),
    ("Flux 512x512", 24, 1536, 1536),
    ("Qwen-Image 1024x1024", 24, 4296, 4296),
    ("Qwen-Image, ulysses 2", 12, 4296, 4296),
    ("Qwen-Image, ring 2", 24, 2148, 4296),
    ("Wan 1.3B 480x832x81", 12, 32760, 32760),
    ("Wan 1.3B, ulysses 2", 6, 32760, 32760),
    ("Wan 1.3B, ring 2", 12, 16380, 32760),
    ("Wan 1.3B, cross-attention to the text", 12, 32760, 512),
)
"""(source, heads, query tokens, key tokens)"""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
AttendWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN attention through PyTorch's SDPA."""
    return _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's SDPA kernels of FlashAttention-2."""
    return _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v)


def flash_attention_3_split_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-3 with the last heads in a separate call, as the models use it."""
    return backends.flash_attention_3_into(q, k, v, torch.empty_like(q))


BACKENDS: Mapping[str, Attend] = {
    "cuDNN": cudnn,
    "SDPA flash": flash,
    "FA3": backends.flash_attention_3,
    "FA3, last heads in a separate call": flash_attention_3_split_heads,
    "FA4": backends.flash_attention_4,
    "flash-attn 2": backends.flash_attention_2,
}

WITH_LSE: Mapping[str, AttendWithLse] = {
    "FA3": backends.flash_attention_3_with_lse,
    "FA4": backends.flash_attention_4_with_lse,
    "flash-attn 2": backends.flash_attention_2_with_lse,
}


@dataclass
class Measured:
    """Measurements of one backend at one shape, or the message of its exception in `failure`."""

    rounds: list[float] = field(default_factory=list)
    error: float = float("nan")
    lse_error: float | None = None
    failure: str = ""

    def speed(self, flops: int) -> str:
        """TFLOP/s as median (minimum to maximum)."""
        if self.failure:
            return "-"
        low, middle, high = (
            flops / each / 1e9 for each in (max(self.rounds), statistics.median(self.rounds), min(self.rounds))
        )
        return f"{middle:.0f} ({low:.0f} to {high:.0f})"

    def errors(self) -> str:
        """Format the errors of the result and of the log-sum-exp."""
        if self.failure:
            return "-"
        return f"{self.error:.1e}" + ("" if self.lse_error is None else f", {self.lse_error:.0e}")


def main() -> None:
    """Measure all shapes and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds in which every backend runs")
    parser.add_argument("--calls", type=int, default=10, help="calls of a backend in one round")
    args = parser.parse_args()
    print_machine("Attention by backend and shape")
    capability = torch.cuda.get_device_capability()
    say(f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}")  # type: ignore[no-untyped-call]
    say(", ".join(f"{each.name} {_version(each.name)}" for each in PACKAGES))
    say()
    speeds, errors, failures = [], [], set()
    for name, heads, queries, keys in SHAPES:
        found = measure(heads, queries, keys, args.rounds, args.calls)
        flops = 4 * queries * keys * heads * HEAD_SIZE
        work = heads * min(queries, keys)
        chosen = choose_backend(
            capability, torch.bfloat16, work, keys, HEAD_SIZE, lambda each: _version(each) != "absent"
        )
        shape = f"{heads} x {queries} x {keys}"
        speeds.append((name, shape, *(each.speed(flops) for each in found.values()), chosen))
        errors.append((name, *(each.errors() for each in found.values())))
        failures |= {f"{backend}: {each.failure}" for backend, each in found.items() if each.failure}
        say(f"measured {name}")
    say()
    print_table(("TFLOP/s", "heads x queries x keys", *BACKENDS, "selected by the models"), speeds)
    print_table(("error of the result, error of the log-sum-exp", *BACKENDS), errors)
    for line in sorted(failures):
        say(line)


@torch.inference_mode()
def measure(heads: int, queries: int, keys: int, rounds: int, calls: int) -> dict[str, Measured]:
    """Measure speed and error of each backend."""
    q = torch.randn(1, queries, heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(1, keys, 2 * heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
    k, v = kv.chunk(2, dim=2)
    exact, exact_lse = reference(q, k, v)
    found = {name: Measured() for name in BACKENDS}
    for name, each in found.items():
        try:
            each.error = _distance(BACKENDS[name](q, k, v), exact)
            if name in WITH_LSE:
                out, lse = WITH_LSE[name](q, k, v)
                each.error = max(each.error, _distance(out, exact))
                each.lse_error = _distance(lse, exact_lse)
        except (RuntimeError, ImportError, AssertionError) as error:
            each.failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    working = [name for name, each in found.items() if not each.failure]
    for _ in range(rounds):
        for name in working:
            attend = BACKENDS[name]
            found[name].rounds.append(milliseconds(lambda: attend(q, k, v), calls=calls))  # noqa: B023
    return found


def reference(q: Tensor, k: Tensor, v: Tensor, rows: int = 2048) -> tuple[Tensor, Tensor]:
    """Attention in float32 and log-sum-exp (batch, heads, tokens), computed in chunks of query rows."""
    k, v = (each.float().transpose(1, 2) for each in (k, v))
    outs, lses = [], []
    for part in torch.split(q, rows, dim=1):
        scores = part.float().transpose(1, 2) @ k.transpose(2, 3) * HEAD_SIZE**-0.5
        lses.append(scores.logsumexp(-1))
        outs.append((scores.softmax(-1) @ v).transpose(1, 2))
    return torch.cat(outs, 1), torch.cat(lses, 2)


def _distance(result: Tensor, exact: Tensor) -> float:
    """Relative L2 distance; NaN if either input contains NaN."""
    return float((result.float() - exact).norm() / exact.norm())


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _version(package: PackageName) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
