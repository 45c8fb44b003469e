"""What the standard stages ask a model: precision, placement, and a callback for each step that differs by model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from configs.approximation import EXACT, Approximation
from configs.models.encoders.base import ImageTextEncoding, TextEncoding

if TYPE_CHECKING:
    from common.artifacts import Canvas, Prompt, Sampling
    from common.checkpoint import Checkpoint
    from models.layers.mesh import WorkerMesh


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(ABC):
    """What every stage of a model is built with, besides its modules.

    `dtype` is that of the weights; `device` is where the stages compute: they move inputs there and outputs back to
    the CPU. `checkpoint_every` is how many steps lie between two checkpoints of the denoising loop, and
    `checkpoint_seconds` after which time there is one anyway; 0 means none. `mesh` is this rank's place in the worker
    group that denoises; None where one rank does it alone. `approximation` is what denoising may leave out.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    checkpoint_every: int = 0
    checkpoint_seconds: float = 0.0
    mesh: WorkerMesh | None = None
    approximation: Approximation = EXACT

    module_loaders: ClassVar[Mapping[str, str]] = {}
    """Loaders of module classes that models.loader does not know, or that are ours: class name in model_index.json to
    "package.module:function", a models.loader.ModuleLoader."""

    parallel_modules: ClassVar[frozenset[str]] = frozenset()
    """Those of module_loaders whose class has a plan for tp, ulysses and ring: their loaders take the mesh, too."""

    @classmethod
    @abstractmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Read the modules' config.json. Raises CheckpointError for architectures that this model does not have."""


@dataclass(frozen=True, kw_only=True)
class StandardPipelineConfig(PipelineConfig):
    """The callbacks of the standard stages, in the order in which a request meets them.

    A raw latent shape is that of the latents before packing, batch first.
    """

    latent_part: ClassVar[str] = "image"
    """The part of Latents that is drawn, denoised and decoded: "image" or "video"."""

    branches: ClassVar[tuple[str, ...]] = ("positive", "negative")
    """Branches of guidance that a step can need."""

    @property
    @abstractmethod
    def text_encodings(self) -> tuple[TextEncoding, ...]:
        """The text encoders, in the order in which they run."""

    @property
    def image_text_encoding(self) -> ImageTextEncoding:
        """The encoder that reads text and pictures together, where there is one."""
        raise TypeError(f"{type(self).__name__} reads text without pictures")

    @abstractmethod
    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes that the encoders' outputs usually have, text's and pictures', by the denoiser's keyword; batch 1."""

    @abstractmethod
    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Whether the request runs the denoiser's negative branch."""

    @property
    def noise_dtype(self) -> torch.dtype:
        """Type that the starting noise is drawn in: that of the prompt embeddings."""
        return self.dtype

    @abstractmethod
    def raw_latent_shape(self, canvas: Canvas, batch: int) -> tuple[int, ...]:
        """Shape of the starting noise as it is drawn."""

    def pack(self, raw: Tensor) -> Tensor:
        """Raw latents in the layout that the denoiser consumes."""
        return raw

    def unpack(self, latents: Tensor, raw_latent_shape: tuple[int, ...]) -> Tensor:
        """The inverse of pack."""
        return latents.reshape(raw_latent_shape)

    @abstractmethod
    def sigmas(self, sampling: Sampling) -> Sequence[float] | None:
        """Noise levels before the scheduler's shift, one a step, highest first; None leaves them to the scheduler."""

    @abstractmethod
    def mu(self, canvas: Canvas) -> float | None:
        """The shift of a scheduler that shifts by size; None for the others."""

    def model_input(self, latents: Tensor, condition: Tensor | None) -> Tensor:
        """What the denoiser takes as its latents, from those of the loop and, of pictures, those given (batched)."""
        assert condition is None, "latents of pictures for a model that takes none"
        return latents

    def model_output(self, prediction: Tensor, latents: Tensor) -> Tensor:
        """The part of the denoiser's prediction that belongs to the loop's latents."""
        del latents
        return prediction

    def vision_tokens(self, hidden_states: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """The denoiser's keywords from all layers of the vision encoder, (pictures, tokens, size) each; batch 1."""
        raise TypeError(f"{type(self).__name__} looks at no pictures, but {len(hidden_states)} layers did")

    def image_size(self, size: tuple[int, int], canvas: Canvas) -> tuple[int, int]:
        """Height and width (pixels) that a picture of this height and width is given to the VAE with."""
        del size
        return canvas.height, canvas.width

    def image_latents(
        self, encode: Callable[[Tensor], Tensor], pictures: Mapping[str, Tensor], canvas: Canvas
    ) -> Tensor:
        """Raw latents from pictures by role, float32 (1, 3, height, width) in [-1, 1]; packed, the condition; batch 1.

        `encode` is the VAE's encoder, from a picture or a video (1, 3, frames, height, width) to its likeliest latents.
        """
        raise TypeError(f"{type(self).__name__} takes no pictures, but {encode} got {canvas} and {', '.join(pictures)}")

    def condition_shape(self, canvas: Canvas) -> tuple[int, ...] | None:
        """Raw shape that image_latents() usually gives; None for a model that takes no pictures."""
        del canvas
        return None

    @abstractmethod
    def model_timestep(self, timestep: Tensor) -> Tensor:
        """What the denoiser takes as its timestep, from the schedule's; float32."""

    @abstractmethod
    def prepare_pos_cond_kwargs(
        self,
        embeds: Mapping[str, Tensor],
        raw_latent_shape: tuple[int, ...],
        sampling: Sampling,
        condition_shape: tuple[int, ...] | None = None,
    ) -> Mapping[str, Tensor | None]:
        """The denoiser's keywords that depend on size and guidance, beside the conditioning's own.

        `condition_shape` is the raw shape of the pictures' latents, in a request that has them.
        """

    def prepare_neg_cond_kwargs(
        self,
        embeds: Mapping[str, Tensor],
        raw_latent_shape: tuple[int, ...],
        sampling: Sampling,
        condition_shape: tuple[int, ...] | None = None,
    ) -> Mapping[str, Tensor | None]:
        """The same for the negative branch."""
        return self.prepare_pos_cond_kwargs(embeds, raw_latent_shape, sampling, condition_shape)

    @abstractmethod
    def guide(self, positive: Tensor, negative: Tensor, sampling: Sampling) -> Tensor:
        """Combine the predictions of the two branches."""

    @abstractmethod
    def vae_latents(self, raw: Tensor) -> Tensor:
        """Undo the normalisation of raw latents, so that the VAE can decode them."""
