"""Builders of modular pipelines (standard stages) and hybrid pipelines (a model-specific stage first)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

from common.pipeline import ComposedPipeline, Cost, StageSpec
from common.stage import Contract
from models import contracts

SCHEDULER = "scheduler"
"""Role of the scheduler in the standard stages."""
TRANSFORMER = "transformer"
"""Role of the transformer in the standard stages."""
_ONE_TRANSFORMER: Mapping[str, str] = MappingProxyType({TRANSFORMER: "transformer"})
"""Module names by role, for a model with a single denoiser."""
_VAE: Mapping[str, str] = MappingProxyType({"vae": "vae"})
"""Module names by role, for decoding without audio."""
DENOISING_STAGE = "models.stages.denoising:DenoisingStage"
"""Reference to the standard denoising loop."""


@dataclass(frozen=True)
class Denoising:
    """A denoising loop: contract, implementation ("package.module:Class") and optional inputs."""

    contract: Contract
    implementation: str
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """A decoder: contract, implementation ("package.module:Class"), result slot and optional inputs."""

    contract: Contract
    implementation: str
    result: str
    inputs: tuple[str, ...] = ()


STANDARD_DENOISING = Denoising(contracts.DENOISING, DENOISING_STAGE)
DMD_DENOISING = Denoising(
    contracts.DENOISING, "models.stages.dmd_denoising:DmdDenoisingStage", inputs=("latents_generator",)
)
GENERATOR_DENOISING = Denoising(contracts.DENOISING, DENOISING_STAGE, inputs=("latents_generator",))
"""The standard loop for models whose decoder draws noise: it passes the generator on to the decoder."""
CAUSAL_DMD_DENOISING = Denoising(
    contracts.CAUSAL_DENOISING,
    "models.stages.causal_dmd_denoising:CausalDMDDenoisingStage",
    inputs=("latents_generator",),
)
MEDIA_DECODING = Decoding(contracts.DECODING, "models.stages.decoding:DecodingStage", result="media")
VIDEO_DECODING = Decoding(
    contracts.VIDEO_DECODING, "models.stages.video_decoding:VideoDecodingStage", result="media_items"
)
NOISY_VIDEO_DECODING = replace(VIDEO_DECODING, inputs=("sampling", "denoising_generator"))
"""Video decoding for models whose decoder may draw noise."""
BLOCK_DECODING = Decoding(
    contracts.BLOCK_DECODING, "models.stages.video_decoding:BlockDecodingStage", result="media_items"
)


class StandardPipeline(ComposedPipeline):
    """Adds sequences of standard stages; a pipeline passes the module names that differ from the defaults.

    The role of a text encoder or tokenizer is its module name, by which the model's config refers to it.
    """

    def add_standard_t2i_stages(
        self,
        *,
        text_modules: Sequence[str] = ("text_encoder", "tokenizer"),
        scheduler: str | None = "scheduler",
        decoders: Mapping[str, str] = _VAE,
        denoising: Denoising = STANDARD_DENOISING,
        decoding: Decoding = MEDIA_DECODING,
        transformers: Mapping[str, str] = _ONE_TRANSFORMER,
    ) -> None:
        """Add the stages of text to image or video: text, noise, schedule, denoising, decoding.

        `scheduler` None: the model defines its own schedule.
        """
        self._add_text_encoding(text_modules)
        self._add_preparation(scheduler)
        self._add_denoising_and_decoding(
            scheduler, decoders=decoders, denoising=denoising, decoding=decoding, transformers=transformers
        )

    def add_hybrid_stages(
        self,
        implementation: str,
        *,
        modules: Sequence[str],
        scheduler: str = "scheduler",
        inputs: Sequence[str] = (),
        denoising_inputs: Sequence[str] = (),
    ) -> None:
        """Add a model-specific stage for all work before denoising, then the denoising and decoding stages.

        `implementation` is "package.module:Class". The role of the scheduler is SCHEDULER; the role of each module in
        `modules` is the module's name. `inputs` and `denoising_inputs` are the optional inputs of this stage and of the
        denoising stage.
        """
        self.add_stage(
            StageSpec(
                contracts.BEFORE_DENOISING.reading(*inputs),
                "before_denoising",
                implementation,
                {**{name: name for name in modules}, SCHEDULER: scheduler},
                cost=Cost.PIXEL,
            )
        )
        self._add_denoising_and_decoding(scheduler, *denoising_inputs)

    def _add_text_encoding(self, modules: Sequence[str]) -> None:
        self.add_stage(
            StageSpec(
                contracts.TEXT_ENCODING,
                "text_encoding",
                "models.stages.text_encoding:TextEncodingStage",
                {name: name for name in modules},
            )
        )

    def _add_preparation(self, scheduler: str | None) -> None:
        self.add_stage(
            StageSpec(
                contracts.LATENT_PREPARATION,
                "latent_preparation",
                "models.stages.latent_preparation:LatentPreparationStage",
                cost=Cost.PIXEL,
            )
        )
        self.add_stage(
            StageSpec(
                contracts.TIMESTEP_PREPARATION,
                "latent_preparation",
                "models.stages.timestep_preparation:TimestepPreparationStage",
                _scheduler_role(scheduler),
            )
        )

    def _add_denoising_and_decoding(
        self,
        scheduler: str | None,
        *optional_inputs: str,
        decoders: Mapping[str, str] = _VAE,
        denoising: Denoising = STANDARD_DENOISING,
        decoding: Decoding = MEDIA_DECODING,
        transformers: Mapping[str, str] = _ONE_TRANSFORMER,
    ) -> None:
        self.add_stage(
            StageSpec(
                denoising.contract.reading(*optional_inputs, *denoising.inputs),
                "denoising",
                denoising.implementation,
                {**transformers, **_scheduler_role(scheduler)},
                cost=Cost.PIXEL_STEP,
                reports_steps=True,
            )
        )
        self.add_stage(
            StageSpec(
                decoding.contract.reading(*decoding.inputs),
                "decoding",
                decoding.implementation,
                decoders,
                cost=Cost.PIXEL,
                result=decoding.result,
            )
        )


def _scheduler_role(scheduler: str | None) -> dict[str, str]:
    return {} if scheduler is None else {SCHEDULER: scheduler}


class StandardImagePipeline(StandardPipeline):
    """Standard stages for models with image inputs."""

    given: ClassVar[Mapping[str, str]] = {**StandardPipeline.given, "image_inputs": "ImageInputs"}

    def add_standard_ti2i_stages(
        self, *, text_modules: Sequence[str] = ("text_encoder", "tokenizer", "processor"), scheduler: str = "scheduler"
    ) -> None:
        """Add the stages of image editing: the text encoder reads images, the denoiser reads their latents."""
        self.add_stage(
            StageSpec(
                contracts.IMAGE_TEXT_ENCODING,
                "text_encoding",
                "models.stages.image_text_encoding:ImageTextEncodingStage",
                {name: name for name in text_modules},
            )
        )
        self._add_image_vae_encoding()
        self._add_preparation(scheduler)
        self._add_denoising_and_decoding(scheduler, "image_latents")

    def add_standard_ti2v_stages(
        self,
        *,
        text_modules: Sequence[str] = ("text_encoder", "tokenizer"),
        image_encoder: str | None = "image_encoder",
        image_processor: str = "image_processor",
        scheduler: str = "scheduler",
        decoders: Mapping[str, str] = _VAE,
        denoising: Denoising = STANDARD_DENOISING,
        decoding: Decoding = VIDEO_DECODING,
        image_inputs: Sequence[str] = (),
        transformers: Mapping[str, str] = _ONE_TRANSFORMER,
    ) -> None:
        """Add the stages of image to video: the denoiser reads image latents and a vision encoder's tokens.

        Unlike in ti2i stages, the text encoder does not read the images. With MEDIA_DECODING, the result is an image or
        a video with audio.

        `image_encoder` None: the model has no vision encoder. `image_inputs` are the optional inputs of the stage that
        encodes images with the VAE.
        """
        self._add_text_encoding(text_modules)
        inputs = ["image_latents"]
        if image_encoder is not None:
            inputs.append("image_conditioning")
            self.add_stage(
                StageSpec(
                    contracts.IMAGE_ENCODING,
                    "image_encoding",
                    "models.stages.image_encoding:ImageEncodingStage",
                    {"image_encoder": image_encoder, "image_processor": image_processor},
                )
            )
        self._add_image_vae_encoding(*image_inputs)
        self._add_preparation(scheduler)
        self._add_denoising_and_decoding(
            scheduler, *inputs, decoders=decoders, denoising=denoising, decoding=decoding, transformers=transformers
        )

    def _add_image_vae_encoding(self, *optional_inputs: str) -> None:
        self.add_stage(
            StageSpec(
                contracts.IMAGE_VAE_ENCODING.reading(*optional_inputs),
                "image_encoding",
                "models.stages.image_encoding:ImageVAEEncodingStage",
                {"vae": "vae"},
                cost=Cost.PIXEL,
            )
        )
