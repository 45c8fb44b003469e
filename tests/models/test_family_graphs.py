"""Every family's denoiser steps can be captured; replays equal eager steps byte for byte."""

from __future__ import annotations

import sys
from functools import _lru_cache_wrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.stage import Call
from fake_graphs import FakeCapture
from models.contracts import DenoisingInput, DenoisingOutput
from models.runtime import Runtime
from models.stages.causal_dmd_denoising import BLOCKS
from models.stages.step_memory import StepMemoryPool
from parallel_cases import FAMILIES, draw_input
from rank_calls import denoising_stage, open_with


def latents_of(stage: Any, x: DenoisingInput) -> list[Tensor]:
    """Run the loop; returns the latents of all parts, or of all blocks if the stage streams blocks."""
    items: list[Any] = []
    call = Call("test", on_item=lambda slot, _, item: items.append(item) if slot == BLOCKS else None)
    done = stage.run(x, call)
    results = [done.denoised_latents] if isinstance(done, DenoisingOutput) else items
    return [part.latents for each in results for part in each.parts.values()]


def forget_cached_tensors() -> None:
    """Clear the lru_caches of all DiTs, as if requests of other shapes had evicted the entries."""
    dits = [module for name, module in sys.modules.items() if name.startswith("models.dits.")]
    for each in {value for module in dits for value in vars(module).values() if type(value) is _lru_cache_wrapper}:
        each.cache_clear()


@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_of_a_family_give_the_same_bytes_as_eager_steps(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    family = FAMILIES[name]
    path = str(family.build(tmp_path / name))
    x = draw_input(*open_with(path, family.config), family)
    capture = FakeCapture()
    stage = denoising_stage(path, family.config, Runtime())
    expected = latents_of(stage, x)
    stage._memory = StepMemoryPool(1 << 30, capture)
    for _ in range(2):
        got = latents_of(stage, x)
        assert len(got) == len(expected) > 0
        assert all(map(torch.equal, got, expected))
        forget_cached_tensors()
    assert capture.graphs
    assert all(graph.replays > 1 for graph in capture.graphs)
