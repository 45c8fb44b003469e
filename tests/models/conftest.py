"""Small Flux checkpoints that the model tests share, open on both sides: built once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flux_pair import Pair, open_pair
from tiny_flux import build_tiny_flux


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
