"""What a step's matrix products and attention cost a GPU, in time and in joules, once it is as hot as it gets.

A card at its power limit slows down until it keeps to it: a step then takes the joules of its kernels divided by that
limit, and no launch gap or idle multiprocessor matters much. Products are of random bfloat16 numbers, at the sizes of
a Flux step.

Run it with: python tests/bench/products.py; it needs a GPU whose driver counts energy
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
from torch.nn.functional import linear

from models.layers.activation import write_gelu
from models.layers.attention import flash_attention_3, flash_attention_3_into
from models.layers.cublas_lt import linear_into

ROWS, SIZE = 4608, 3072
"""Tokens and hidden size."""

SETS = 4
"""Of inputs and weights, in turn: none stays in the L2 cache."""

WARM_UP_SECONDS = 6.0

CARD: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """Calls that do the same with one set each."""

    name: str
    flops: float
    run: Callable[[int], object]


class EnergyCounter:
    """The joules that the first GPU has used since its driver was loaded."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._check(self._library.nvmlInit_v2())
        self._check(self._library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device)))

    def joules(self) -> float:
        """Its present value, which moves about ten times a second."""
        value = ctypes.c_ulonglong()
        self._check(self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(value)))
        return value.value / 1e3

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"the driver does not tell its energy: NVML status {status}")


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="that each is run for")
    args = parser.parse_args()
    print_machine("Products and attention of a Flux step, hot")
    say(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    say()
    counter = EnergyCounter()
    products = (*plain("queries, keys, values", 3 * SIZE, SIZE), *plain("out", SIZE, 5 * SIZE))
    works = [*feed_forward(), *products, *attending()]
    heat(works[0], WARM_UP_SECONDS)
    rows = []
    for work in works:
        seconds, watts = measure(work, counter, args.seconds)
        speed = work.flops / seconds / 1e12
        joules = watts * seconds
        cells = (f"{speed:.0f}", f"{watts:.0f}", f"{1e3 * joules:.0f}", f"{1e12 * joules / work.flops:.2f}")
        rows.append((work.name, 1e6 * seconds, *cells))
    print_table(("", "us", "TFLOP/s", "W", "mJ a call", "pJ/FLOP"), rows)


def feed_forward() -> list[Work]:
    """A single block's, with its GELU, into the columns behind attention's."""
    hidden = 4 * SIZE
    x, weight, bias = operands(hidden, SIZE)
    wide = torch.empty(1, ROWS, SIZE + hidden, **CARD)
    columns, aside = wide[..., SIZE:], torch.empty(1, ROWS, hidden, **CARD)
    flops = 2.0 * ROWS * hidden * SIZE

    def in_two_passes(index: int) -> None:
        torch.addmm(bias, x[index], weight[index].t(), out=aside[0])
        write_gelu(aside, columns)

    return [
        Work("feed-forward without GELU", flops, lambda index: linear(x[index], weight[index], bias)),
        Work("feed-forward, then GELU", flops, in_two_passes),
        Work(
            "feed-forward with GELU, cuBLASLt",
            flops,
            lambda index: linear_into(x[index], weight[index], bias, columns[0], gelu=True),
        ),
    ]


def plain(name: str, width: int, size: int) -> list[Work]:
    """A product with its bias, by PyTorch and by cuBLASLt without a workspace."""
    x, weight, bias = operands(width, size)
    out = torch.empty(ROWS, width, **CARD)
    flops = 2.0 * ROWS * width * size
    return [
        Work(name, flops, lambda index: linear(x[index], weight[index], bias)),
        Work(f"{name}, cuBLASLt", flops, lambda index: linear_into(x[index], weight[index], bias, out)),
    ]


def attending() -> list[Work]:
    """Among all tokens on one GPU, and from half of them on one of two; whole, and with heads shared out."""
    works = []
    for queries in (ROWS, ROWS // 2):
        q, k, v = (torch.randn(SETS, 1, tokens, 24, 128, **CARD) for tokens in (queries, ROWS, ROWS))
        whole = partial(attend, flash_attention_3, q, k, v)
        shared = partial(attend, partial(flash_attention_3_into, out=torch.empty_like(q[0])), q, k, v)
        flops = 4.0 * queries * ROWS * SIZE
        works.append(Work(f"attention, {queries} queries", flops, whole))
        works.append(Work(f"attention, {queries} queries, heads shared out", flops, shared))
    return works


def attend(function: Callable[[Tensor, Tensor, Tensor], object], q: Tensor, k: Tensor, v: Tensor, index: int) -> object:
    """To one set."""
    return function(q[index], k[index], v[index])


def operands(width: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (SETS, ROWS, size), weights (SETS, width, size), a bias (width,)."""
    x = torch.randn(SETS, ROWS, size, **CARD)
    weight = torch.randn(SETS, width, size, **CARD) / size**0.5
    return x, weight, torch.randn(width, **CARD)


def heat(work: Work, seconds: float) -> None:
    """Keep the card busy."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        some_calls(work, 100)


def some_calls(work: Work, calls: int) -> None:
    """Make them, and wait for them."""
    for index in range(calls):
        work.run(index % SETS)
    torch.cuda.synchronize()


def measure(work: Work, counter: EnergyCounter, seconds: float) -> tuple[float, float]:
    """Seconds a call, and watts meanwhile. The counter's steps of 0.1 s are a few hundredths of what it tells."""
    some_calls(work, 100)
    calls, began, joules = 0, time.perf_counter(), counter.joules()
    while (elapsed := time.perf_counter() - began) < seconds:
        some_calls(work, 100)
        calls += 100
    return elapsed / calls, (counter.joules() - joules) / elapsed


if __name__ == "__main__":
    main()
