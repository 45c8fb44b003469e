"""The float8 format (e4m3) of quantized weights and activations, and its range."""

from __future__ import annotations

import torch

FLOAT8 = torch.float8_e4m3fn

LARGEST = torch.finfo(FLOAT8).max
"""Largest finite number of the format."""

SMALLEST_MAGNITUDE = 1e-12
"""Lower bound of a row's largest magnitude, which prevents a division by zero for rows of zeros."""
