"""Compile the fused GEMM kernels with QuACK, without a GPU; kernel_energy.py checks their results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from async_tests import HANG_SECONDS

TESTS = Path(__file__).resolve().parents[1]


def test_the_fused_gemm_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """Compile in another process: the compilers read the environment, which simulates a GPU, at import."""
    environment = os.environ | {
        "CUTE_DSL_ARCH": "sm_90a",
        "QUACK_ARCH": "90",
        "QUACK_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(TESTS.parent),
    }
    command = [sys.executable, str(TESTS / "quack_compiler.py")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[:-1] == [
        f"{name} GemmEpiPlan" for name in ("_gelu", "_gelu", "_gated", "_gated", "_normed_heads")
    ]
    assert len(list(tmp_path.rglob("*.o"))) == 5, "each kernel has different tiles or dtypes"
