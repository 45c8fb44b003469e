"""Compiles the fused GEMM kernels for Hopper without a GPU; prints name and plan type of each kernel.

Run it with CUTE_DSL_ARCH=sm_90a and QUACK_ARCH=90 in the environment, as no GPU reports its architecture.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from quack.epilogue.frontend import EpiMod
from quack.gemm_runtime import host

ROWS, WIDTH, SIZE = 1536, 1536, 384
MULTIPROCESSORS = 132


def compile_only(self: Any, *args: Any, **keywords: Any) -> None:
    """Replacement of EpiMod.gemm that compiles but does not launch."""
    plan = gemm(self, *args, _launch=False, **keywords)
    sys.stdout.write(f"{self.fn.__name__} {type(plan).__name__}\n")


gemm = EpiMod.gemm
EpiMod.gemm = compile_only
# Normally queried from the CUDA driver.
host.get_max_active_clusters = lambda size: MULTIPROCESSORS // size

from models.kernels import quack_epilogues  # noqa: E402

x = torch.empty(ROWS, SIZE, dtype=torch.bfloat16)
weight = torch.empty(WIDTH, SIZE, dtype=torch.bfloat16)
vector = torch.empty(WIDTH, dtype=torch.bfloat16)
columns = torch.empty(ROWS, 2 * WIDTH, dtype=torch.bfloat16)[:, WIDTH:]
quack_epilogues.gelu_into(x, weight, vector, columns)
quack_epilogues.gelu_into(x, weight[:1280], vector[:1280], columns[:, :1280])
for gate in (vector, vector.float()):
    quack_epilogues.add_gated(x, weight, vector, gate, columns)
quack_epilogues.normed_heads_into(x, weight, vector, vector, torch.empty(ROWS, 128), columns)
