"""Artifacts passed between stages of one process are contiguous, as artifacts are after transport."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.artifacts import LatentPart, Latents, Prompt
from common.local import HostedStages
from common.stage import Call, PipelineStage
from common.streams import densified


@dataclass(frozen=True, kw_only=True)
class DrawInput:
    prompt: Prompt


@dataclass(frozen=True, kw_only=True)
class DrawnOutput:
    latents: Latents


class ColumnMajorStage(PipelineStage[DrawInput, DrawnOutput]):
    """Returns latents of which one part is contiguous and one part is column-major."""

    def run(self, x: DrawInput, call: Call) -> DrawnOutput:
        """Return two parts with equal values and different strides."""
        del x, call
        rows = torch.arange(6.0).reshape(2, 3)
        parts = {"rows": LatentPart(latents=rows, raw_latent_shape=(2, 3))}
        return DrawnOutput(
            latents=Latents(parts=parts | {"columns": LatentPart(latents=rows.mT.clone().mT, raw_latent_shape=(2, 3))})
        )


def test_outputs_are_contiguous_as_after_transport() -> None:
    """Kernels may round differently for other strides; a fleet must return the same bytes as one process."""
    outputs = HostedStages("draw", [ColumnMajorStage()]).run({"prompt": Prompt(prompt="red")}, Call("test"))
    rows, columns = (part.latents for part in outputs["latents"].parts.values())
    assert torch.equal(rows, columns)
    assert rows.stride() == columns.stride() == (3, 1)


def test_densified_returns_contiguous_artifacts_themselves() -> None:
    tensor = torch.zeros(2, 3)
    artifact = Latents(parts={"image": LatentPart(latents=tensor, raw_latent_shape=(2, 3))})
    assert densified(artifact) is artifact
    columns, unchanged = densified((tensor.mT, tensor))
    assert columns.is_contiguous()
    assert unchanged is tensor
