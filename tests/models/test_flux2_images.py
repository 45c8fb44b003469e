"""Reference images of FLUX.2 are resized and cropped as by Diffusers' image processor."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from torch import Tensor

from coarse_images import coarse_image, png
from common.artifacts import Canvas
from common.image_header import read_image_header
from configs.models.dits.flux2 import Flux2TransformerConfig
from configs.models.vaes.flux2 import MAX_PIXELS, AutoencoderKLFlux2Config, area_limited
from configs.pipeline_configs.flux2_klein import Flux2KleinImagePipelineConfig
from configs.sample.flux2 import Flux2ImageSamplingParams
from models.images import as_tensor, center_crop

SIZES = [(64, 64), (100, 70), (95, 81), (1024, 1024), (1025, 1024), (1500, 903), (310, 2400)]


def theirs(image: Image.Image) -> Tensor:
    """Pixels that Flux2KleinPipeline passes to the VAE."""
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    processor.check_image_input(image)
    if image.width * image.height > 1024 * 1024:
        image = processor._resize_to_target_area(image, 1024 * 1024)
    height, width = (side // 16 * 16 for side in (image.height, image.width))
    pixels: Tensor = processor.preprocess(image, height=height, width=width, resize_mode="crop")
    return pixels


CONFIG = Flux2KleinImagePipelineConfig(
    transformer=Flux2TransformerConfig(), vae=AutoencoderKLFlux2Config(), is_distilled=False
)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_and_default_size_match_diffusers(size: tuple[int, int]) -> None:
    image = coarse_image(*size)
    resized = CONFIG.image_size((image.height, image.width), Canvas(height=64, width=64))
    ours = center_crop(as_tensor(image, *resized), *CONFIG.image_crop(resized))
    assert torch.equal(ours, theirs(image))
    assert resized[0] * resized[1] <= MAX_PIXELS
    header = read_image_header("image", png(image))
    defaults = Flux2ImageSamplingParams.image_defaults({"image": header}, {})
    assert (defaults["height"], defaults["width"]) == resized == area_limited(image.height, image.width)
