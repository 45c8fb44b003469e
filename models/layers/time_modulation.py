"""Modulations computed from a timestep. Parameter names are those of Diffusers' checkpoints.

Shapes: B batch, D hidden size.
"""

# ruff: noqa: N803  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from models.layers.embeddings import EmbeddingMLP, sinusoidal_embedding

TIME_FREQUENCIES = 256
"""Size of the sinusoidal embedding."""


class TimeEmbedding(nn.Module):
    """Embedding of a timestep."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.timestep_embedder = EmbeddingMLP(TIME_FREQUENCIES, size)

    def forward(self, timestep_B: Tensor) -> Tensor:
        """(B,) to (B, D), in the dtype of the weights."""
        embedded: Tensor = self.timestep_embedder(sinusoidal_embedding(timestep_B, TIME_FREQUENCIES))
        return embedded


class TimeModulation(nn.Module):
    """Projection of a timestep to `rows` modulations."""

    def __init__(self, size: int, rows: int) -> None:
        super().__init__()
        self.emb = TimeEmbedding(size)
        self.linear = nn.Linear(size, rows * size)
        self.rows = rows

    def forward(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        """Modulations (B, rows, D) and the time embedding (B, 1, D) of timesteps (B,), float32."""
        embedding = self.emb(timestep_B)
        modulation: Tensor = self.linear(silu(embedding))
        return modulation.view(len(modulation), self.rows, -1).float(), embedding[:, None].float()
