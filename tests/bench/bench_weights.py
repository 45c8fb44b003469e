"""Models of a workload with random weights: Diffusers' and ours, on the same tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from bench_device import default_dtype
from bench_inputs import Inputs
from bench_works import TINY, Work
from diffusers import WanTransformer3DModel
from torch import Tensor

from models.dits.base import DiffusionTransformer
from models.dits.wan import FLOAT32_PARAMETERS
from models.layers.linear import absent_biases


def build_reference(work: Work, device: torch.device, *, tiny: bool) -> Any:
    """Diffusers' model in bfloat16, with its default initialization from a fixed seed.

    Wan's FLOAT32_PARAMETERS are in float32.
    """
    torch.manual_seed(0)
    sizes = {**work.sizes, **(TINY[work.reference] if tiny else {})}
    with device, default_dtype(torch.bfloat16):
        model = work.reference(**sizes)
    for name, parameter in model.named_parameters():
        if work.reference is WanTransformer3DModel and any(part in name for part in FLOAT32_PARAMETERS):
            parameter.data = parameter.data.float()
    return model.requires_grad_(False).eval()


def same_weights(work: Work, theirs: Any) -> DiffusionTransformer:
    """Our model on the reference's tensors, before projections are fused."""
    return over_weights(on_meta(work, theirs), theirs.state_dict())


def on_meta(work: Work, theirs: Any) -> DiffusionTransformer:
    """Our model at the reference's sizes, on the meta device."""
    with torch.device("meta"):
        return work.ours(dict(theirs.config))


def over_weights(ours: DiffusionTransformer, state: Mapping[str, Tensor]) -> DiffusionTransformer:
    """Our model with the reference's tensors or their shards.

    Biases that the reference does not have become zeros, with the dtype of the first tensor.
    """
    like = next(iter(state.values()))
    zeros = {name: torch.zeros(ours.get_parameter(name).shape).to(like) for name in absent_biases(ours)}
    ours.load_state_dict({**state, **zeros}, strict=True, assign=True)
    return ours.requires_grad_(False).eval()


def on(device: torch.device, given: Inputs) -> Inputs:
    """Move the inputs to the device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
