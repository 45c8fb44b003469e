"""Guidance of LTX-2: up to four branches, combined on the clean latents that they predict, for each part by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from torch import Tensor

from configs.pipeline_configs.base import NEGATIVE, POSITIVE
from configs.pipeline_configs.rescaled import rescaled

if TYPE_CHECKING:
    from common.artifacts import ParamValue, Sampling

PERTURBED, ISOLATED = "perturbed", "isolated"


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Strength of each kind of guidance on one part; `scale` and `modality` do nothing at 1, `stg` and `rescale` at 0.

    `scale` pushes away from the negative prompt, `stg` (spatio-temporal guidance) from blocks without self-attention,
    `modality` from a prediction without the other part. `rescale` is the share of the result that gets the standard
    deviation of the unguided prediction.
    """

    scale: float
    stg: float
    modality: float
    rescale: float

    def guided(self, clean: Mapping[str, Tensor]) -> Tensor:
        """The guided clean latents, from those that the branches predict; branches that are not there are left out."""
        positive = clean[POSITIVE]
        guided = positive
        for branch, weight in ((NEGATIVE, self.scale - 1), (PERTURBED, self.stg), (ISOLATED, self.modality - 1)):
            if branch in clean:
                guided = guided + weight * (positive - clean[branch])
        return rescaled(guided, positive, self.rescale)


@dataclass(frozen=True, kw_only=True)
class LTX2Guidance:
    """Guidance of a request; `blocks` are those whose self-attention the perturbed branch skips."""

    video: Scales
    audio: Scales
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, sampling: Sampling) -> Self:
        """The guidance that a request asks for."""
        params = sampling.params
        blocks = params.get("spatio_temporal_guidance_blocks", ())
        assert isinstance(blocks, tuple), "its type is that of LTX2SamplingParams"
        return cls(
            video=_scales(params, "", sampling.guidance_scale),
            audio=_scales(params, "audio_", params.get("audio_guidance_scale")),
            blocks=tuple(int(block) for block in blocks),
        )

    @property
    def parts(self) -> dict[str, Scales]:
        """Scales by latent part."""
        return {"video": self.video, "audio": self.audio}

    @property
    def wants_negative(self) -> bool:
        """Whether a negative prompt is read."""
        return any(each.scale > 1 for each in self.parts.values())

    @property
    def wants_perturbed(self) -> bool:
        """Whether spatio-temporal guidance is on."""
        return any(each.stg > 0 for each in self.parts.values())

    @property
    def wants_isolated(self) -> bool:
        """Whether modality guidance is on."""
        return any(each.modality > 1 for each in self.parts.values())


def _scales(params: Mapping[str, ParamValue], prefix: str, scale: ParamValue | None) -> Scales:
    return Scales(
        scale=_number(scale, 1.0),
        stg=_number(params.get(f"{prefix}stg_scale"), 0.0),
        modality=_number(params.get(f"{prefix}modality_scale"), 1.0),
        rescale=_number(params.get(f"{prefix}guidance_rescale"), 0.0),
    )


def _number(value: ParamValue | None, default: float) -> float:
    """The value of a float parameter; one that is not there has no effect."""
    assert value is None or isinstance(value, float | int), "its type is that of LTX2SamplingParams"
    return default if value is None else float(value)
