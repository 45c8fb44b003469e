"""Modular style: a pipeline composed of the standard stages."""

from __future__ import annotations

from collections.abc import Sequence

from common.pipeline import ComposedPipeline, StageSpec
from models import contracts


class StandardPipeline(ComposedPipeline):
    """Adds runs of standard stages. A model passes the names of its own modules where they differ."""

    def add_standard_t2i_stages(
        self, *, text_modules: Sequence[str] = ("text_encoder", "tokenizer"), scheduler: str = "scheduler"
    ) -> None:
        """Text to image: encode the text, draw the noise, lay out the steps, denoise, decode."""
        self.add_stage(
            StageSpec(
                contracts.TEXT_ENCODING,
                "text_encoding",
                "models.stages.text_encoding:TextEncodingStage",
                tuple(text_modules),
            )
        )
        self._add_preparation(scheduler)
        self._add_denoising_and_decoding(scheduler)

    def _add_preparation(self, scheduler: str) -> None:
        self.add_stage(
            StageSpec(
                contracts.LATENT_PREPARATION,
                "latent_preparation",
                "models.stages.latent_preparation:LatentPreparationStage",
                (),
            )
        )
        self.add_stage(
            StageSpec(
                contracts.TIMESTEP_PREPARATION,
                "latent_preparation",
                "models.stages.timestep_preparation:TimestepPreparationStage",
                (scheduler,),
            )
        )

    def _add_denoising_and_decoding(self, scheduler: str) -> None:
        self.add_stage(
            StageSpec(
                contracts.DENOISING,
                "denoising",
                "models.stages.denoising:DenoisingStage",
                ("transformer", scheduler),
            )
        )
        self.add_stage(StageSpec(contracts.DECODING, "decoding", "models.stages.decoding:DecodingStage", ("vae",)))
