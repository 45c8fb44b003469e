"""The first stage of every pipeline, run by the coordinator before a request is accepted. It needs no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from common.artifacts import ImageInputs, ParamValue
from common.errors import InvalidInput
from common.image_header import ImageHeader, check_total_size, read_image_header
from configs.sample.base import ParamWarning, SamplingParams
from models.catalog import ServedModel

_NO_IMAGES: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True)
class ValidatedRequest:
    """A request that can run: every parameter set, the artifacts that its pipeline is given, and what was changed."""

    params: SamplingParams
    artifacts: Mapping[str, object]
    warnings: tuple[ParamWarning, ...]


class InputValidationStage:
    """Turns what a caller gave into the first artifacts of one model's pipeline."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._roles = model.sampling_params.image_roles(model.checkpoint)

    def run(self, given: Mapping[str, ParamValue], images: Mapping[str, bytes] = _NO_IMAGES) -> ValidatedRequest:
        """Check and complete a request. `images` are the picture files that came with it, by role.

        Of the pictures only the headers are read. Raises InvalidInput that names the field, the value and what would
        be right.
        """
        self._check_roles(images)
        headers = {role: read_image_header(role, data) for role, data in images.items()}
        check_total_size(headers)
        params, warnings = self._model.sampling_params.build(given, self._model.checkpoint, headers)
        made = {type(each).__name__: each for each in (*params.artifacts().values(), ImageInputs(images=images))}
        artifacts = {slot: made[kind] for slot, kind in self._model.pipeline.given.items()}
        return ValidatedRequest(params, artifacts, (*warnings, *_image_warnings(headers)))

    def _check_roles(self, images: Mapping[str, bytes]) -> None:
        known = (*self._roles.required, *self._roles.optional)
        name = f"{self._model.name} ({self._model.checkpoint.pipeline_name})"
        if images and not known:
            raise InvalidInput(f"{name} takes no images, but {len(images)} came", field="images")
        for role in self._roles.required:
            if role not in images:
                raise InvalidInput(f"{name} needs a picture as {role!r}, but none came", field=role)
        if unknown := [role for role in images if role not in known]:
            came = ", ".join(images)
            raise InvalidInput(f"{name} takes {', '.join(known)} as pictures, but {came} came", field=unknown[0])


def _image_warnings(headers: Mapping[str, ImageHeader]) -> tuple[ParamWarning, ...]:
    message = "has 16-bit grey levels, of which all above 255 become white, as in Diffusers; convert it to 8 bits"
    return tuple(ParamWarning(role, f"{role} {message}") for role, header in headers.items() if header.is_16_bit_grey)
