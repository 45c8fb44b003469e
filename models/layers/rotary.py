"""RoPE over several axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.rotation import Rotation


def rotary_embedding(ids: Tensor, axes_dims: Sequence[int], theta: float = 10000.0) -> Rotation:
    """RoPE for positions `ids` (tokens, axes), where axis i rotates axes_dims[i] channels of a head.

    Angles are computed in float64: at large positions the error of float32 is visible in the output.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        angles.append(torch.outer(ids[:, axis].double(), 1.0 / theta**exponents))
    joined = torch.cat(angles, dim=-1)
    return Rotation(joined.cos().float(), joined.sin().float())
