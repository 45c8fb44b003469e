"""Sampling parameters of Qwen-Image-Layered, as Diffusers 0.42's QwenImageLayeredPipeline takes and rounds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Self

from common.artifacts import Canvas, ParamValue, Prompt, Sampling
from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from common.image_header import ImageHeader
from configs.models.vaes.qwen_image import given_size
from configs.sample.base import ImageRoles, ParamWarning, parameter
from configs.sample.qwen_image import QwenImageSamplingParams

RESOLUTIONS = (640, 1024)
_DEFAULT_RESOLUTION = 640
_UNSET = "it follows from the image and resolution"


@dataclass(frozen=True, kw_only=True)
class QwenImageLayeredSamplingParams(QwenImageSamplingParams):
    """Qwen-Image-Layered. Layers have the image's proportion and about resolution x resolution pixels.

    Diffusers takes no size; here one may be given that is this one. A fleet sets it when it validates a request.
    """

    # Room for the most layers at the larger resolution.
    max_total_pixels: ClassVar[int] = 2**25

    prompt: str = parameter("What the image shows; where it is empty, the model describes the image itself.", "")
    height: int = parameter("Height in pixels.", minimum=1, maximum=8192, unset=_UNSET)
    width: int = parameter("Width in pixels.", minimum=1, maximum=8192, unset=_UNSET)
    layers: int = parameter("Layers that the image is taken apart into; a file for each.", 4, minimum=1, maximum=20)
    resolution: int = parameter(
        "Side of a square with the pixels of a layer: 640 or 1024.", _DEFAULT_RESOLUTION, minimum=640, maximum=1024
    )
    cfg_normalize: bool = parameter("Whether guidance keeps the norm of the positive prediction.", False)
    use_en_prompt: bool = parameter(
        "Whether an empty prompt becomes an English description, else a Chinese one.", False
    )

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """One image."""
        del checkpoint
        return ImageRoles(required=("image",))

    @classmethod
    def build(
        cls,
        given: Mapping[str, ParamValue],
        checkpoint: Checkpoint,
        images: Mapping[str, ImageHeader] = MappingProxyType({}),
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """As SamplingParams.build(); also raises InvalidInput for a size that image and resolution do not give."""
        params, warnings = super().build(given, checkpoint, images)
        for name, side in cls.image_defaults(images, {"resolution": params.resolution}).items():
            if (asked := params.extent[name]) != side:
                message = f"{name}: {asked} is not the {name} that image and resolution give"
                raise InvalidInput(f"{message}; {side} works, and so does none", field=name)
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
        """The size of the layers. Raises InvalidInput for another resolution."""
        if "image" not in images:
            return {}
        resolution = values["resolution"]
        if resolution not in RESOLUTIONS:
            works = " or ".join(map(str, RESOLUTIONS))
            raise InvalidInput(
                f"resolution: {resolution!r} is not one of this model; {works} works", field="resolution"
            )
        height, width = given_size(images["image"].height, images["image"].width, cls.pixels_of(int(resolution)))
        return {"height": height, "width": width}

    @classmethod
    def pixels_of(cls, resolution: int) -> int:
        """Pixels of a layer, about."""
        return resolution * resolution

    @property
    def extent(self) -> dict[str, int]:
        """Height, width, and the layers with the whole image, which is made too."""
        return {**super().extent, "layers": 1 + self.layers}

    def artifacts(self) -> dict[str, Prompt | Canvas | Sampling]:
        """The same, with the layers as the canvas' frames."""
        made = super().artifacts()
        canvas = made["canvas"]
        assert isinstance(canvas, Canvas), "SamplingParams.artifacts() puts each in its slot"
        return {**made, "canvas": replace(canvas, num_frames=self.layers)}
