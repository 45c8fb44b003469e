"""Guidance of LTX-2: combines up to four branches' predicted clean latents, separately for each part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from torch import Tensor

from configs.pipeline_configs.base import NEGATIVE, POSITIVE
from configs.pipeline_configs.guidance import rescaled

if TYPE_CHECKING:
    from common.artifacts import ParamValue, Sampling

PERTURBED, ISOLATED = "perturbed", "isolated"


@dataclass(frozen=True, kw_only=True)
class GuidanceScales:
    """Guidance scales of one part. Neutral values are 1 for `scale` and `modality`, 0 for `stg` and `rescale`.

    `scale` guides away from the negative prompt, `stg` (spatio-temporal guidance) from a prediction without
    self-attention in some blocks, and `modality` from a prediction without cross-modal attention. `rescale` is the
    fraction of the result that is rescaled to the standard deviation of the unguided prediction.
    """

    scale: float
    stg: float
    modality: float
    rescale: float

    def guided(self, clean: Mapping[str, Tensor]) -> Tensor:
        """Combine the branches' clean latents into guided clean latents; absent branches are skipped."""
        positive = clean[POSITIVE]
        guided = positive
        for branch, weight in ((NEGATIVE, self.scale - 1), (PERTURBED, self.stg), (ISOLATED, self.modality - 1)):
            if branch in clean:
                guided = guided + weight * (positive - clean[branch])
        return rescaled(guided, positive, self.rescale)


@dataclass(frozen=True, kw_only=True)
class LTX2Guidance:
    """Guidance of a request. The perturbed branch skips self-attention in `blocks`."""

    video: GuidanceScales
    audio: GuidanceScales
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, sampling: Sampling) -> Self:
        """The guidance of a request."""
        params = sampling.params
        blocks = params.get("spatio_temporal_guidance_blocks", ())
        assert isinstance(blocks, tuple), "LTX2SamplingParams validates it"
        return cls(
            video=_scales(params, "", sampling.guidance_scale),
            audio=_scales(params, "audio_", params.get("audio_guidance_scale")),
            blocks=tuple(int(block) for block in blocks),
        )

    @property
    def parts(self) -> dict[str, GuidanceScales]:
        """Scales by latent part."""
        return {"video": self.video, "audio": self.audio}

    @property
    def wants_negative(self) -> bool:
        """Whether guidance by a negative prompt is enabled."""
        return any(each.scale > 1 for each in self.parts.values())

    @property
    def wants_perturbed(self) -> bool:
        """Whether spatio-temporal guidance is enabled."""
        return any(each.stg > 0 for each in self.parts.values())

    @property
    def wants_isolated(self) -> bool:
        """Whether modality guidance is enabled."""
        return any(each.modality > 1 for each in self.parts.values())


def _scales(params: Mapping[str, ParamValue], prefix: str, scale: ParamValue | None) -> GuidanceScales:
    return GuidanceScales(
        scale=_number(scale, 1.0),
        stg=_number(params.get(f"{prefix}stg_scale"), 0.0),
        modality=_number(params.get(f"{prefix}modality_scale"), 1.0),
        rescale=_number(params.get(f"{prefix}guidance_rescale"), 0.0),
    )


def _number(value: ParamValue | None, default: float) -> float:
    """The value of a float parameter, or its neutral default if it is absent."""
    assert value is None or isinstance(value, float | int), "LTX2SamplingParams validates it"
    return default if value is None else float(value)
