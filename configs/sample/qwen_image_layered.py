"""Sampling parameters of Qwen-Image-Layered, following Diffusers 0.42's QwenImageLayeredPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Self

from common.artifacts import Canvas, ParamValue, Prompt, Sampling
from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from common.image_header import ImageHeader
from configs.models.vaes.qwen_image import image_size_of_area
from configs.sample.base import ImageRoles, ParamWarning, parameter
from configs.sample.qwen_image import QwenImageSamplingParams

RESOLUTIONS = (640, 1024)
"""Supported values of `resolution`, in pixels."""
_DEFAULT_RESOLUTION = 640
_UNSET = "it is computed from the image and resolution"


@dataclass(frozen=True, kw_only=True)
class QwenImageLayeredSamplingParams(QwenImageSamplingParams):
    """Qwen-Image-Layered. Layers have the image's aspect ratio and about resolution x resolution pixels.

    Diffusers has no size parameters. Here, height and width exist because a validated request contains them; only their
    computed values are accepted.
    """

    # Sufficient for 20 layers at resolution 1024.
    max_total_pixels: ClassVar[int] = 2**25

    prompt: str = parameter("Description of the image; if it is empty, the model captions the image.", "")
    height: int = parameter("Height in pixels.", minimum=1, maximum=8192, unset=_UNSET)
    width: int = parameter("Width in pixels.", minimum=1, maximum=8192, unset=_UNSET)
    layers: int = parameter("Number of layers; each is a file.", 4, minimum=1, maximum=20)
    resolution: int = parameter(
        "Side of a square with as many pixels as a layer: 640 or 1024.", _DEFAULT_RESOLUTION, minimum=640, maximum=1024
    )
    cfg_normalize: bool = parameter("Whether guidance preserves the norm of the positive prediction.", False)
    use_en_prompt: bool = parameter("Whether the caption for an empty prompt is English instead of Chinese.", False)

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """One required image."""
        del checkpoint
        return ImageRoles(required=("image",))

    @classmethod
    def build(
        cls,
        given: Mapping[str, ParamValue],
        checkpoint: Checkpoint,
        images: Mapping[str, ImageHeader] = MappingProxyType({}),
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Build as SamplingParams.build() does. Raises InvalidInput, also for a size other than the computed size."""
        params, warnings = super().build(given, checkpoint, images)
        for name, side in cls.image_defaults(images, {"resolution": params.resolution}).items():
            if (asked := params.extent[name]) != side:
                message = f"{name}: {asked} is not the {name} computed from the image and resolution"
                raise InvalidInput(f"{message}; {side} or no {name} works", field=name)
        return params, warnings

    @classmethod
    def model_defaults(cls, checkpoint: Checkpoint) -> dict[str, ParamValue]:
        """The size for a square image."""
        del checkpoint
        return {"height": _DEFAULT_RESOLUTION, "width": _DEFAULT_RESOLUTION}

    @classmethod
    def image_defaults(
        cls, images: Mapping[str, ImageHeader], values: Mapping[str, ParamValue]
    ) -> dict[str, ParamValue]:
        """The size of the layers. Raises InvalidInput for an unsupported resolution."""
        if "image" not in images:
            return {}
        resolution = values["resolution"]
        if resolution not in RESOLUTIONS:
            works = " or ".join(map(str, RESOLUTIONS))
            raise InvalidInput(f"resolution: {resolution!r} is not supported; {works} works", field="resolution")
        image = images["image"]
        height, width = image_size_of_area(image.height, image.width, cls.pixels_of(int(resolution)))
        return {"height": height, "width": width}

    @classmethod
    def pixels_of(cls, resolution: int) -> int:
        """Approximate number of pixels of a layer."""
        return resolution * resolution

    @property
    def extent(self) -> dict[str, int]:
        """Height, width, and layers plus one: the model also generates the whole image."""
        return {**super().extent, "layers": 1 + self.layers}

    def artifacts(self) -> dict[str, Prompt | Canvas | Sampling]:
        """The base class's artifacts, with the number of layers as `Canvas.num_frames`."""
        made = super().artifacts()
        canvas = made["canvas"]
        assert isinstance(canvas, Canvas), "SamplingParams.artifacts() has one artifact per slot"
        return {**made, "canvas": replace(canvas, num_frames=self.layers)}
