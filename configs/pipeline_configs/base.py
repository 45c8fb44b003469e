"""Callbacks of the standard stages, by class: text, images, preparation, denoising and decoding.

A family's config inherits the classes of the standard stages in its pipelines; a hybrid model requires only the classes
of denoising and decoding. Configs are frozen and independent of the process: device, requested dtype and worker group
are in `models.runtime.Runtime`.

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
    """Architecture, module loaders and dtypes of one model; subclasses add groups of callbacks."""

    title: ClassVar[str] = ""
    """Published name of the models, for the table of families; configs with equal titles share a row."""

    deviations: ClassVar[str] = ""
    """Differences from Diffusers with reasons, in one or two short sentences; empty: none."""

    module_loaders: ClassVar[Mapping[str, str]] = {}
    """References "package.module:function" to a models.loader.ModuleLoader, by class in model_index.json.

    Only for classes to which models.loader assigns no loader.
    """

    parallel_modules: ClassVar[frozenset[str]] = frozenset()
    """Classes of module_loaders with a parallel plan; their loaders also take the mesh."""

    parallel_axes: ClassVar[tuple[str, ...]] = ("tp", "ulysses", "ring")
    """Axes of the worker mesh that parallel_modules support. The number of guidance branches limits the axis cfg."""

    module_dtypes: ClassVar[Mapping[str, torch.dtype]] = {}
    """Dtypes of modules that do not use the requested dtype, by module name."""

    @classmethod
    @abstractmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Parse the modules' config.json. Raises CheckpointError for unsupported architectures."""

    def dtype_of(self, module: str, requested: torch.dtype) -> torch.dtype:
        """The dtype of a module's weights."""
        return self.module_dtypes.get(module, requested)


class NegativePromptConfig(PipelineConfig):
    """Callback of all text encoding stages: whether a request needs a negative prompt."""

    @abstractmethod
    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Whether the request needs conditioning of a negative prompt."""


class TextConfig(NegativePromptConfig):
    """Callbacks of text encoding."""

    @property
    @abstractmethod
    def text_encodings(self) -> tuple[TextEncoding, ...]:
        """The text encoders, in execution order."""


class ImageTextConfig(NegativePromptConfig):
    """Callbacks of text encoding by a vision-language model."""

    @property
    @abstractmethod
    def image_text_encoding(self) -> ImageTextEncoding:
        """The encoder of text and images."""


class VisionConfig(PipelineConfig):
    """Callbacks of a vision encoder."""

    @abstractmethod
    def vision_tokens(self, hidden_states: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Map all layers' hidden states, each (images, tokens, size), to the denoiser's keywords, batch 1."""


class LatentLayout(PipelineConfig):
    """Callbacks for the parts of the latents, their shapes and their packing."""

    @abstractmethod
    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """Shapes of the initial noise by part, in the order of the draws."""

    def pack(self, part: str, raw: Tensor) -> Tensor:
        """Convert a part's raw latents to the denoiser's layout."""
        del part
        return raw

    def unpack(self, part: str, latents: Tensor, raw_latent_shape: tuple[int, ...]) -> Tensor:
        """The inverse of pack()."""
        del part
        return latents.reshape(raw_latent_shape)

    def posterior_shape(self, canvas: Canvas) -> tuple[int, ...] | None:
        """Shape of the noise that samples image latents from the VAE's distribution; None: use the mode.

        This noise is the first draw of a request, before the initial noise, in the VAE's dtype.
        """
        del canvas
        return None


class ImageLatentsConfig(LatentLayout):
    """Callbacks of encoding images to conditioning latents."""

    resampling: ClassVar[Literal["lanczos", "bilinear"]] = "lanczos"
    """Pillow's filter to resize an image for the VAE."""

    image_mode: ClassVar[Literal["RGB", "RGBA"]] = "RGB"
    """Pillow's mode of an image for the VAE."""

    def recompression(self, sampling: Sampling) -> int:
        """H.264 constant rate factor to compress an image before encoding; 0: no compression."""
        del sampling
        return 0

    def image_size(self, size: tuple[int, int], canvas: Canvas) -> tuple[int, int]:
        """Height and width (pixels) for the VAE, from an image's height and width."""
        del size
        return canvas.height, canvas.width

    def image_crop(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width (pixels) of the center crop of an image resized to `size`."""
        return size

    @abstractmethod
    def image_latents(self, encode: Callable[[Tensor], Tensor], images: Mapping[str, Tensor], canvas: Canvas) -> Parts:
        """Raw latents by part, batch 1, from images by role, float32 (1, channels, height, width) in [-1, 1].

        `encode` is the VAE's encoder: it maps an image, or a video (1, channels, frames, height, width), to the mode of
        the latents, or to a sample if posterior_shape() is not None.
        """


class PreparationConfig(LatentLayout):
    """Callbacks of latent and timestep preparation."""

    has_float32_noise: ClassVar[bool] = False
    """Whether the initial noise is always drawn in float32, instead of the requested dtype."""

    def noise_dtype(self, requested: torch.dtype) -> torch.dtype:
        """Dtype of the initial noise."""
        return torch.float32 if self.has_float32_noise else requested

    @abstractmethod
    def sigmas(self, sampling: Sampling) -> Sequence[float] | None:
        """Noise levels before the shift, one per step, descending; None: the scheduler's own noise levels."""

    def timesteps(self, sampling: Sampling) -> Sequence[float] | None:
        """Timesteps, one per step; None: the scheduler computes them from the shifted sigmas."""
        del sampling
        return None

    def own_schedule(self, sampling: Sampling) -> Sequence[tuple[float, float]] | None:
        """Timestep and noise level of each step of the model's own schedule; None: the scheduler's schedule."""
        del sampling
        return None

    @abstractmethod
    def mu(self, canvas: Canvas) -> float | None:
        """The scheduler's shift mu for this size; None for schedulers without dynamic shifting."""

    def mu_of_steps(self, canvas: Canvas, sampling: Sampling) -> float | None:
        """The shift mu for this size and the request's number of steps."""
        del sampling
        return self.mu(canvas)


@dataclass(frozen=True)
class Step:
    """A denoising step; `sigma` and `next_sigma` are the noise levels before and after the step, by part."""

    index: int
    timestep: float
    sigma: Mapping[str, float]
    next_sigma: Mapping[str, float]


class DenoisingConfig(LatentLayout):
    """Callbacks of the denoising loop, called at warm-up, once per request, at each step, and at the end.

    A step calls before_step(), model_input(), active(), expert(), model_output(), guide() and after_step(), in this
    order. The defaults are for models with one denoiser, two branches and no hooks. Models override `expert` for two
    denoisers (Wan 2.2 A14B), `active` for guidance that ends at a step (Z-Image), `branch_flags` for branches that skip
    blocks (LTX-2), and `before_step` and `after_loop` for tokens without noise (LTX image to video).
    """

    part_keywords: ClassVar[Mapping[str, str]]
    """Keywords of predict() by denoised part."""

    condition_keywords: ClassVar[Mapping[str, str]] = {}
    """Keywords of predict() by conditioning part of model_input()'s result."""

    prediction_dtype: ClassVar[torch.dtype | None] = None
    """Dtype of guidance and steps; None: the denoiser's dtype."""

    transformers: ClassVar[tuple[str, ...]] = (TRANSFORMER,)
    """Roles of the denoisers (experts)."""

    branches: ClassVar[tuple[str, ...]] = (POSITIVE, NEGATIVE)
    """All guidance branches; their number limits the ranks of the cfg axis."""

    has_step_cache: ClassVar[bool] = True
    """Whether the loop supports the step cache."""

    @abstractmethod
    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Typical shapes of encoder outputs by the denoiser's keyword, batch 1; for warm-up."""

    def conditioning_id_shapes(self, canvas: Canvas) -> Shapes:
        """Shapes of token ids (int64) in encoder outputs by the denoiser's keyword, batch 1; for warm-up."""
        del canvas
        return {}

    def condition_shapes(self, canvas: Canvas) -> Shapes:
        """Typical raw shapes of image latents by part, batch 1, for warm-up; empty for a model without images."""
        del canvas
        return {}

    def branches_of(self, sampling: Sampling, *, has_negative: bool) -> tuple[str, ...]:
        """The branches of a request. `has_negative`: the request has conditioning of a negative prompt."""
        del sampling
        return tuple(branch for branch in self.branches if has_negative or branch != NEGATIVE)

    def branch_flags(self, branch: str, sampling: Sampling) -> Mapping[str, Hashable]:
        """Static keywords of predict() for a branch, such as indices of skipped blocks."""
        del branch, sampling
        return {}

    @abstractmethod
    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Keywords of prepare() that depend on size and guidance, in addition to the conditioning.

        `shapes` are the raw shapes of all parts, including image latents.
        """

    def prepare_neg_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Keywords of prepare() for the negative branch."""
        return self.prepare_pos_cond_kwargs(embeds, shapes, sampling)

    @abstractmethod
    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """Map the schedule's timesteps (steps, B) to model timesteps, (steps, B) or (steps, B, segments)."""

    def prepared_timesteps(self, timesteps: Tensor) -> Tensor:
        """Timesteps (rows,) for prepare(): the schedule's timesteps, optionally followed by others."""
        return timesteps

    def expert(self, step: Step) -> str:
        """The role of a step's denoiser."""
        del step
        return TRANSFORMER

    def active(self, step: Step, branches: Sequence[str], sampling: Sampling) -> Sequence[str]:
        """The subset of the request's branches that a step computes."""
        del step, sampling
        return branches

    def before_step(self, step: Step, latents: Parts, conditions: Parts) -> Parts:
        """Modify the latents before a step. `conditions` are the batched image latents by part."""
        del step, conditions
        return latents

    def model_input(self, latents: Parts, conditions: Parts) -> Parts:
        """Combine the loop's latents and the batched image latents into the denoiser's latents, by part."""
        del conditions
        return latents

    def model_output(self, predictions: Parts, latents: Parts) -> Parts:
        """Convert the denoiser's predictions to predictions for the loop's latents."""
        del latents
        return predictions

    @abstractmethod
    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Combine the predictions of a step's branches; called only for two or more branches."""

    def after_step(self, step: Step, latents: Parts, conditions: Parts) -> Parts:
        """Modify the latents after a step."""
        del step, conditions
        return latents

    def after_loop(self, latents: Parts, conditions: Parts) -> Parts:
        """Modify the latents after the last step."""
        del conditions
        return latents


@dataclass(frozen=True)
class DecodingNoise:
    """Settings of a decoder that removes noise, both in [0, 1].

    `scale` is the fraction of noise mixed into the latents; `timestep` conditions the decoder.
    """

    scale: float
    timestep: float


class DecodingConfig(LatentLayout):
    """Callbacks of decoding."""

    visual_part: ClassVar[str]
    """The part that the VAE decodes to pixels: "image" or "video"."""

    denormalising_dtype: ClassVar[torch.dtype | None] = None
    """Dtype of the input of vae_latents() and of a video VAE; None: the VAE's dtype."""

    audio_part: ClassVar[str | None] = None
    """The part that audio VAE and vocoder decode; None for a model without audio."""

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of the audio in Hz. Raises TypeError for a model without audio."""
        raise TypeError(f"{type(self).__name__} has no audio")

    def decoding_noise(self, sampling: Sampling) -> DecodingNoise | None:
        """Settings of the noise added before decoding, drawn by the request's generator; None: no noise."""
        del sampling
        return None

    def num_frames(self, canvas: Canvas) -> int:
        """Number of frames that the VAE decodes for a canvas."""
        return canvas.num_frames

    def saved_latents(self, part: str, latents: Tensor, raw_latent_shape: tuple[int, ...], decoder: Any) -> Tensor:
        """Convert a part's latents from the loop's layout to Diffusers' output. `decoder` is the part's VAE."""
        del part, raw_latent_shape, decoder
        return latents

    def saved_pixels(self, pixels: Tensor, outputs: int) -> Tensor:
        """Convert pixels (images, channels, height, width) of `outputs` outputs to Diffusers' output."""
        del outputs
        return pixels

    @abstractmethod
    def vae_latents(self, raw: Tensor) -> Tensor:
        """Denormalize raw latents for the VAE's decoder; the dtype does not change."""


class StandardPipelineConfig(TextConfig, PreparationConfig, DenoisingConfig, DecodingConfig):
    """Callbacks of a pipeline with text input only."""
