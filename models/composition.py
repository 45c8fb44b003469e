"""Modular style: a pipeline composed of the standard stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from common.pipeline import ComposedPipeline, StageSpec
from models import contracts


class StandardPipeline(ComposedPipeline):
    """Adds runs of standard stages. A model passes the names of its own modules where they differ."""

    def add_standard_t2i_stages(
        self, *, text_modules: Sequence[str] = ("text_encoder", "tokenizer"), scheduler: str = "scheduler"
    ) -> None:
        """Text to image, or to video: encode the text, draw the noise, lay out the steps, denoise, decode."""
        self._add_text_encoding(text_modules)
        self._add_preparation(scheduler)
        self._add_denoising_and_decoding(scheduler)

    def _add_image_vae_encoding(self) -> None:
        self.add_stage(
            StageSpec(
                contracts.IMAGE_VAE_ENCODING,
                "image_encoding",
                "models.stages.image_encoding:ImageVAEEncodingStage",
                ("vae",),
            )
        )

    def _add_text_encoding(self, modules: Sequence[str]) -> None:
        self.add_stage(
            StageSpec(
                contracts.TEXT_ENCODING,
                "text_encoding",
                "models.stages.text_encoding:TextEncodingStage",
                tuple(modules),
            )
        )

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


class StandardImagePipeline(StandardPipeline):
    """The same for models that start from pictures."""

    given: ClassVar[Mapping[str, str]] = {**StandardPipeline.given, "image_inputs": "ImageInputs"}

    def add_standard_ti2i_stages(
        self, *, text_modules: Sequence[str] = ("text_encoder", "tokenizer", "processor"), scheduler: str = "scheduler"
    ) -> None:
        """Text and images to image: the text encoder sees the pictures, and the denoiser their latents."""
        self.add_stage(
            StageSpec(
                contracts.IMAGE_TEXT_ENCODING,
                "text_encoding",
                "models.stages.image_text_encoding:ImageTextEncodingStage",
                tuple(text_modules),
            )
        )
        self._add_image_vae_encoding()
        self._add_preparation(scheduler)
        self._add_denoising_and_decoding(scheduler)

    def add_standard_ti2v_stages(
        self,
        *,
        text_modules: Sequence[str] = ("text_encoder", "tokenizer"),
        image_modules: Sequence[str] = ("image_encoder", "image_processor"),
        scheduler: str = "scheduler",
    ) -> None:
        """Text and images to video: the denoiser gets a vision encoder's tokens, and the images' latents.

        Without `image_modules` there is no vision encoder.
        """
        self._add_text_encoding(text_modules)
        if image_modules:
            self.add_stage(
                StageSpec(
                    contracts.IMAGE_ENCODING,
                    "image_encoding",
                    "models.stages.image_encoding:ImageEncodingStage",
                    tuple(image_modules),
                )
            )
        self._add_image_vae_encoding()
        self._add_preparation(scheduler)
        self._add_denoising_and_decoding(scheduler)
