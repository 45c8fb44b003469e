"""What tests share: small Flux checkpoints, open on both sides and built once a session, ranks of worker
groups, and a logger of their own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest

# Read when Triton is first imported, which torch does where it is installed: kernels then run on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from flux_pair import Pair, open_pair
from rank_pool import RankPool
from tiny_flux import build_tiny_flux


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Put the root logger back: a service's main(), run in a test, sets it up for its process.

    Else a later record would go to a stream that is closed by then, and logging would complain on stderr.
    """
    root = logging.getLogger()
    level, handlers, logger_class = root.level, list(root.handlers), logging.getLoggerClass()
    yield
    logging.captureWarnings(False)
    logging.setLoggerClass(logger_class)
    root.setLevel(level)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    for handler in set(handlers) - set(root.handlers):
        root.addHandler(handler)


@pytest.fixture
def rounded_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in bfloat16 is that in float32, rounded. So it is from torch 2.13 on; before, it is drawn otherwise."""
    draw = torch.randn

    def rounded(*size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return draw(*size, **options).to(dtype or torch.get_default_dtype())

    monkeypatch.setattr(torch, "randn", rounded)


@pytest.fixture(scope="session")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Like FLUX.1-dev: guidance embedding, schedule shifted by size."""
    with open_pair(str(build_tiny_flux(tmp_path_factory.mktemp("dev")))) as pair:
        yield pair


@pytest.fixture(scope="session")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Like FLUX.1-schnell: no guidance embedding, schedule with a fixed shift."""
    path = tmp_path_factory.mktemp("schnell")
    with open_pair(str(build_tiny_flux(path, guidance_embeds=False, dynamic_shift=False, seed=1))) as pair:
        yield pair


@pytest.fixture(scope="session")
def rank_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four processes that form worker groups of any layout, one after the other."""
    pool = RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
