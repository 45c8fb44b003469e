"""Range of the 8-bit floats (e4m3) that float8 GEMM multiplies."""

from __future__ import annotations

import torch

FLOAT8 = torch.float8_e4m3fn

LARGEST = torch.finfo(FLOAT8).max

SMALLEST_MAGNITUDE = 1e-12
"""Lower bound of a row's largest magnitude, so that rows of zeros stay zeros."""
