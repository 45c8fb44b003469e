"""A small LTX-2 checkpoint opened by this project and by Diffusers' two pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import LTX2ImageToVideoPipeline, LTX2Pipeline
from PIL import Image
from torch import Tensor

from coarse_images import png
from local_fleet import NO_IMAGES, LocalFleet, open_fleet, relative_error
from wan_pair import LATENTS_WITHIN, PIXELS_WITHIN, open_reference

SEED = 7

Request = dict[str, Any]


def given(prompt: str = "a red apple on the moon", **others: Any) -> Request:
    """A small request with every kind of guidance at Diffusers' defaults. STG perturbs an existing block."""
    size: Request = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 3, "seed": SEED}
    usual: Request = {"spatio_temporal_guidance_blocks": (1.0,), "max_sequence_length": 32}
    return {"prompt": prompt, **size, **usual, **others}


@dataclass(frozen=True)
class Sides:
    """One checkpoint: our services in `fleet`, and Diffusers' pipelines `text` and `image`."""

    fleet: LocalFleet
    text: Any
    image: Any

    @classmethod
    def open(cls, path: Path) -> Sides:
        """Open the checkpoint with this project and with both pipelines of Diffusers."""
        text, image = (open_reference(path, kind) for kind in (LTX2Pipeline, LTX2ImageToVideoPipeline))
        return cls(open_fleet(str(path)), text, image)

    def ours(self, request: Request, image: Image.Image | None = None) -> dict[str, Tensor]:
        """Run our services; returns "latents", "pixels", "audio_latents" and "audio".

        An image selects the I2V variant.
        """
        images: Mapping[str, bytes] = NO_IMAGES if image is None else {"image": png(image)}
        return self.fleet.tensors(images=images, **given(**request))

    def theirs(self, request: Request, image: Image.Image | None = None) -> dict[str, Tensor]:
        """Run Diffusers' pipeline; returns a dict with the keys of ours().

        The pipeline's VAEs and vocoder decode the returned latents.
        """
        pipeline = self.text if image is None else self.image
        latents, audio_latents = self.call(request, image, "latent")
        with torch.inference_mode():
            decoded = pipeline.vae.decode(latents, None, return_dict=False)[0]
            audio = pipeline.vocoder(pipeline.audio_vae.decode(audio_latents, return_dict=False)[0])
        pixels = pipeline.video_processor.postprocess_video(decoded, output_type="pt")
        return {"latents": latents, "pixels": pixels, "audio_latents": audio_latents, "audio": audio}

    def call(self, request: Request, image: Image.Image | None, output_type: str) -> tuple[Tensor, Tensor]:
        """Call Diffusers' pipeline; returns video and audio as latents, or as pixels and samples ("pt")."""
        call = given(**request)
        generator = torch.Generator("cpu").manual_seed(call.pop("seed"))
        call["num_videos_per_prompt"] = call.pop("num_outputs_per_prompt", 1)
        call["spatio_temporal_guidance_blocks"] = [int(each) for each in call["spatio_temporal_guidance_blocks"]]
        if "sigmas" in call:
            call["sigmas"] = list(call["sigmas"])
        pipeline = self.text if image is None else self.image
        images = {} if image is None else {"image": image}
        with torch.inference_mode():
            video, audio = pipeline(**call, **images, generator=generator, output_type=output_type, return_dict=False)
        return video, audio


def check(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Assert equal shapes, and float32 tolerances for latents, pixels and audio."""
    assert {name: each.shape for name, each in ours.items()} == {name: each.shape for name, each in theirs.items()}
    for name in ("latents", "audio_latents"):
        assert relative_error(ours[name], theirs[name]) <= LATENTS_WITHIN, name
    for name in ("pixels", "audio"):
        assert float((ours[name] - theirs[name]).abs().max()) <= PIXELS_WITHIN, name
        assert float(theirs[name].std()) > 0.02, f"flat {name} would prove nothing"
