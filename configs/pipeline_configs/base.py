"""Callbacks of the standard stages, a class for each group of stages: text, image, preparation, denoising, decoding.

A family's config inherits the groups of the standard stages that its pipelines use; a hybrid model needs the groups of
denoising and decoding only. Configs are frozen and know nothing of the process: devices, requested dtypes and the
worker group are in `models.runtime.Runtime`.

Latents are mappings from part names ("image", "video", "audio") to tensors, batch first. A raw latent shape is the
shape of a part before packing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from configs.models.encodings import ImageTextEncoding, TextEncoding

if TYPE_CHECKING:
    from common.artifacts import Canvas, Prompt, Sampling
    from common.checkpoint import Checkpoint

Parts = Mapping[str, Tensor]
"""Tensors by the names of latent parts."""
Shapes = Mapping[str, tuple[int, ...]]
"""Raw latent shapes by the names of latent parts."""
Keywords = Mapping[str, Tensor | None]
"""Keywords of a denoiser's prepare()."""

POSITIVE, NEGATIVE = "positive", "negative"
TRANSFORMER = "transformer"


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(ABC):
    """Architecture, module loaders and precision of one model; subclasses add the groups of callbacks."""

    title: ClassVar[str] = ""
    """The published name of the models, for the table of families; configs with the same title share a row."""

    deviations: ClassVar[str] = ""
    """Differences from Diffusers and their reasons, in one or two short sentences; empty: none."""

    module_loaders: ClassVar[Mapping[str, str]] = {}
    """Loaders of module classes that models.loader does not know: class name in model_index.json to
    "package.module:function", a models.loader.ModuleLoader."""

    parallel_modules: ClassVar[frozenset[str]] = frozenset()
    """Classes of module_loaders with a plan for parallel_axes: their loaders also take the mesh."""

    parallel_axes: ClassVar[tuple[str, ...]] = ("tp", "ulysses", "ring")
    """Axes of the worker mesh that parallel_modules can use; cfg follows from the branches of guidance."""

    module_dtypes: ClassVar[Mapping[str, torch.dtype]] = {}
    """Precision of modules that do not run in the requested one, by module name."""

    @classmethod
    @abstractmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Read the modules' config.json. Raises CheckpointError for architectures that this model does not have."""

    def dtype_of(self, module: str, requested: torch.dtype) -> torch.dtype:
        """The precision of a module's weights."""
        return self.module_dtypes.get(module, requested)


class NegativePromptConfig(PipelineConfig):
    """Whether a request needs a negative prompt; all text encoders ask it."""

    @abstractmethod
    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Whether the request needs the conditioning of a negative prompt."""


class TextConfig(NegativePromptConfig):
    """Callbacks of text encoding."""

    @property
    @abstractmethod
    def text_encodings(self) -> tuple[TextEncoding, ...]:
        """The text encoders, in the order in which they run."""


class ImageTextConfig(NegativePromptConfig):
    """Callbacks of text encoding by a language model that also reads the images."""

    @property
    @abstractmethod
    def image_text_encoding(self) -> ImageTextEncoding:
        """The encoder of text and images."""


class VisionConfig(PipelineConfig):
    """Callbacks of a vision encoder."""

    @abstractmethod
    def vision_tokens(self, hidden_states: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """The denoiser's keywords from all layers of the vision encoder, (images, tokens, size) each; batch 1."""


class LatentLayout(PipelineConfig):
    """Parts of the latents, their shapes and their packing."""

    @abstractmethod
    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """Shapes of the starting noise by part, in the order in which the parts are drawn."""

    def pack(self, part: str, raw: Tensor) -> Tensor:
        """Raw latents of a part in the layout that the denoiser consumes."""
        del part
        return raw

    def unpack(self, part: str, latents: Tensor, raw_latent_shape: tuple[int, ...]) -> Tensor:
        """The inverse of pack()."""
        del part
        return latents.reshape(raw_latent_shape)

    def posterior_shape(self, canvas: Canvas) -> tuple[int, ...] | None:
        """Shape of the noise that draws image latents from the VAE's distribution; None: the likeliest are taken.

        It is the first draw of a request, before the starting noise, in the VAE's dtype.
        """
        del canvas
        return None


class ImageLatentsConfig(LatentLayout):
    """Callbacks of encoding images to latents, which condition the denoiser."""

    resampling: ClassVar[Literal["lanczos", "bilinear"]] = "lanczos"
    """Pillow's filter that resizes an image for the VAE."""

    image_mode: ClassVar[Literal["RGB", "RGBA"]] = "RGB"
    """Pillow's mode of an image for the VAE: its channels."""

    def recompression(self, sampling: Sampling) -> int:
        """Constant rate factor of H.264 with which an image is compressed before it is encoded; 0: it is not."""
        del sampling
        return 0

    def image_size(self, size: tuple[int, int], canvas: Canvas) -> tuple[int, int]:
        """Height and width (pixels) to which an image of this height and width is resized for the VAE."""
        del size
        return canvas.height, canvas.width

    def image_crop(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width (pixels) of the middle of an image, resized to this height and width, that is encoded."""
        return size

    @abstractmethod
    def image_latents(self, encode: Callable[[Tensor], Tensor], images: Mapping[str, Tensor], canvas: Canvas) -> Parts:
        """Raw latents by part, batch 1, from images by role, float32 (1, channels, height, width) in [-1, 1].

        `encode` is the VAE's encoder: an image or a video (1, 3, frames, height, width) to the mode of its latents, or
        to a sample where posterior_shape() says so.
        """


class PreparationConfig(LatentLayout):
    """Callbacks of latent and timestep preparation."""

    has_float32_noise: ClassVar[bool] = False
    """Whether the starting noise is drawn in float32 in every precision, and not in that of the prompt embeddings."""

    def noise_dtype(self, requested: torch.dtype) -> torch.dtype:
        """Dtype in which the starting noise is drawn, where the prompt embeddings have the requested one."""
        return torch.float32 if self.has_float32_noise else requested

    @abstractmethod
    def sigmas(self, sampling: Sampling) -> Sequence[float] | None:
        """Noise levels before the scheduler's shift, one a step, highest first; None: the scheduler's own."""

    def timesteps(self, sampling: Sampling) -> Sequence[float] | None:
        """Timesteps, one a step, of a model whose timesteps do not follow from the shifted sigmas; None: they do."""
        del sampling
        return None

    def own_schedule(self, sampling: Sampling) -> Sequence[tuple[float, float]] | None:
        """Timestep and noise level of each step of a model that has a schedule of its own; None: the scheduler's."""
        del sampling
        return None

    @abstractmethod
    def mu(self, canvas: Canvas) -> float | None:
        """The shift of a scheduler that shifts by size; None for the others."""

    def mu_of_steps(self, canvas: Canvas, sampling: Sampling) -> float | None:
        """The same for a request's number of steps, on which it may depend too."""
        del sampling
        return self.mu(canvas)


@dataclass(frozen=True)
class Step:
    """One step of a denoising loop; `sigma` and `next_sigma` are its noise levels before and after, by part."""

    index: int
    timestep: float
    sigma: Mapping[str, float]
    next_sigma: Mapping[str, float]


class DenoisingConfig(LatentLayout):
    """Callbacks of the denoising loop: for warm-up, once a request, at each step, after the loop.

    A step calls before_step(), model_input(), active(), expert(), model_output(), guide() and after_step(), in this
    order. Defaults are those of models with one denoiser, two branches and no hooks. `expert` serves models with two
    denoisers (Wan 2.2 A14B), `active` models whose guidance ends at a step (Z-Image), `branch_flags` branches that skip
    blocks (LTX-2), `before_step` and `after_step` tokens that are not stepped (LTX image to video).
    """

    part_keywords: ClassVar[Mapping[str, str]]
    """The parts that the loop denoises, each with the keyword of predict() that takes it."""

    condition_keywords: ClassVar[Mapping[str, str]] = {}
    """Other parts that model_input() returns, each with the keyword of predict() that takes it."""

    prediction_dtype: ClassVar[torch.dtype | None] = None
    """Dtype in which predictions are guided and stepped; None: the denoiser's."""

    transformers: ClassVar[tuple[str, ...]] = (TRANSFORMER,)
    """Roles of the denoisers (experts)."""

    branches: ClassVar[tuple[str, ...]] = (POSITIVE, NEGATIVE)
    """All branches of guidance; the cfg axis of a worker group has at most as many ranks."""

    has_step_cache: ClassVar[bool] = True
    """Whether a step may reuse the work of earlier steps."""

    @abstractmethod
    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Usual shapes of the encoders' outputs by the denoiser's keyword, batch 1; for warm-up."""

    def conditioning_id_shapes(self, canvas: Canvas) -> Shapes:
        """Shapes of token ids (int64) among the encoders' outputs by the denoiser's keyword, batch 1; for warm-up."""
        del canvas
        return {}

    def condition_shapes(self, canvas: Canvas) -> Shapes:
        """Usual raw shapes of image latents by part, batch 1, for warm-up; empty for a model without images."""
        del canvas
        return {}

    def branches_of(self, sampling: Sampling, *, has_negative: bool) -> tuple[str, ...]:
        """The branches of a request; `has_negative`: it has the conditioning of a negative prompt."""
        del sampling
        return tuple(branch for branch in self.branches if has_negative or branch != NEGATIVE)

    def branch_flags(self, branch: str, sampling: Sampling) -> Mapping[str, Hashable]:
        """Static keywords of predict() that a branch needs, such as indices of skipped blocks."""
        del branch, sampling
        return {}

    @abstractmethod
    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Keywords that depend on size and guidance, besides the conditioning's own.

        `shapes` are the raw shapes of all parts, those of image latents included.
        """

    def prepare_neg_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """The same keywords for the negative branch."""
        return self.prepare_pos_cond_kwargs(embeds, shapes, sampling)

    @abstractmethod
    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """The denoiser's timesteps from those of the schedule, (steps, B) to (steps, B) or (steps, B, segments)."""

    def prepared_timesteps(self, timesteps: Tensor) -> Tensor:
        """The timesteps (rows,) that the denoiser prepares: those of the schedule, and further ones after them."""
        return timesteps

    def expert(self, step: Step) -> str:
        """The role of the denoiser that a step needs."""
        del step
        return TRANSFORMER

    def active(self, step: Step, branches: Sequence[str], sampling: Sampling) -> Sequence[str]:
        """The branches of the request that a step needs."""
        del step, sampling
        return branches

    def before_step(self, step: Step, latents: Parts, conditions: Parts) -> Parts:
        """Change the latents before a step. `conditions` are the image latents by part, batched."""
        del step, conditions
        return latents

    def model_input(self, latents: Parts, conditions: Parts) -> Parts:
        """The denoiser's latents by part, from those of the loop and the image latents, batched."""
        del conditions
        return latents

    def model_output(self, predictions: Parts, latents: Parts) -> Parts:
        """The denoiser's predictions for the loop's latents, in their shapes."""
        del latents
        return predictions

    @abstractmethod
    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Combine the predictions of a step's branches; called where a step has more than one."""

    def after_step(self, step: Step, latents: Parts, conditions: Parts) -> Parts:
        """Change the latents after a step."""
        del step, conditions
        return latents

    def after_loop(self, latents: Parts, conditions: Parts) -> Parts:
        """Change the latents after the last step."""
        del conditions
        return latents


@dataclass(frozen=True)
class DecodingNoise:
    """Settings of a decoder that removes noise: `scale` is the share of noise in the latents; both are in [0, 1]."""

    scale: float
    timestep: float


class DecodingConfig(LatentLayout):
    """Callbacks of decoding."""

    visual_part: ClassVar[str]
    """The part that the VAE decodes to pixels: "image" or "video"."""

    denormalising_dtype: ClassVar[torch.dtype | None] = None
    """The precision of the latents that vae_latents() and a video's VAE get; None: that of the VAE."""

    sound_part: ClassVar[str | None] = None
    """The part that audio VAE and vocoder decode to sound; None for a model without sound."""

    @property
    def sampling_rate(self) -> int:
        """Samples a second of the sound. Raises TypeError for a model without sound."""
        raise TypeError(f"{type(self).__name__} makes no sound")

    def decoding_noise(self, sampling: Sampling) -> DecodingNoise | None:
        """The noise that latents get before they are decoded, drawn by the request's generator; None: none is drawn."""
        del sampling
        return None

    def num_frames(self, canvas: Canvas) -> int:
        """Frames that the VAE makes of a video of this canvas."""
        return canvas.num_frames

    def saved_latents(self, part: str, latents: Tensor, raw_latent_shape: tuple[int, ...], decoder: Any) -> Tensor:
        """A part's latents as Diffusers returns them, from those of the loop. `decoder` is the part's VAE."""
        del part, raw_latent_shape, decoder
        return latents

    def saved_pixels(self, pixels: Tensor, outputs: int) -> Tensor:
        """Pixels of all images (images, channels, height, width) as Diffusers returns those of `outputs` outputs."""
        del outputs
        return pixels

    @abstractmethod
    def vae_latents(self, raw: Tensor) -> Tensor:
        """Undo the normalisation of raw latents, in their dtype, so that the VAE can decode them."""


class StandardPipelineConfig(TextConfig, PreparationConfig, DenoisingConfig, DecodingConfig):
    """The groups that a pipeline from text alone uses."""
