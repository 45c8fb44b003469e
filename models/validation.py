"""Validates a request before the coordinator accepts it, and makes the first artifacts of its pipeline."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from common.artifacts import ImageInputs, ParamValue
from common.errors import FailedPrecondition, InvalidInput
from common.image_header import ImageHeader, check_total_size, read_image_header
from common.pipeline import PipelineError
from configs.sample.base import ImageRoles, ParamWarning, SamplingParams
from models.catalog import ServedModel, ServedVariant

_INITIAL_ARTIFACTS = frozenset({"Prompt", "Canvas", "Sampling", "ImageInputs"})
_NO_IMAGES: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True)
class ValidatedRequest:
    """A request that can run: its variant, every parameter, the artifacts that its pipeline is given, and warnings."""

    variant: ServedVariant
    params: SamplingParams
    artifacts: Mapping[str, object]
    warnings: tuple[ParamWarning, ...]


class InputValidationStage:
    """Makes the first artifacts of one model's pipeline from what a caller gave.

    Raises PipelineError for a pipeline that is given artifacts of other kinds.
    """

    def __init__(self, model: ServedModel) -> None:
        if unknown := sorted(
            {kind for each in model.variants for kind in each.pipeline.given.values()} - _INITIAL_ARTIFACTS
        ):
            made = ", ".join(sorted(_INITIAL_ARTIFACTS))
            raise PipelineError(f"given: {', '.join(unknown)} is not made from a request; {made} are")
        self._model = model

    def choose(self, given: Collection[str], images: Collection[str], recorded: str = "") -> ServedVariant:
        """The variant for a request with these parameters and roles of images; `recorded` where it was chosen before.

        Of several that take the images it is the first one that has all parameters, else the first one. Raises
        InvalidInput that names the variants and their images where none takes them, and FailedPrecondition where the
        recorded variant is not served here.
        """
        if recorded:
            return self._recorded(recorded)
        if len(self._model.variants) == 1 and not self._model.unserved:
            (variant,) = self._model.variants
            self._check_roles(variant.roles, images)
            return variant
        fits = [each for each in self._model.variants if _takes(each.roles, images)]
        if not fits:
            raise self._no_variant(images)
        return next((each for each in fits if {spec.name for spec in each.specs}.issuperset(given)), fits[0])

    def run(
        self, given: Mapping[str, ParamValue], images: Mapping[str, bytes] = _NO_IMAGES, *, recorded: str = ""
    ) -> ValidatedRequest:
        """Check and complete a request. `images` are the image files that came with it, by role.

        Of the images only the headers are read. `recorded` is the variant of a request that was accepted before. Raises
        InvalidInput that names the field, the value and what would be right, and FailedPrecondition as choose().
        """
        variant = self.choose(given, images, recorded)
        headers = {role: read_image_header(role, data) for role, data in images.items()}
        check_total_size(headers)
        params, warnings = variant.sampling_params.build(given, self._model.checkpoint, headers)
        made = {type(each).__name__: each for each in (*params.artifacts().values(), ImageInputs(images=images))}
        artifacts = {slot: made[kind] for slot, kind in variant.pipeline.given.items()}
        return ValidatedRequest(variant, params, artifacts, (*warnings, *_image_warnings(headers)))

    def _recorded(self, name: str) -> ServedVariant:
        variant = self._model.variant(name)
        if variant is None:
            served = ", ".join(each.name for each in self._model.variants if each.name) or "one variant without a name"
            reason = self._model.unserved.get(name, f"it serves {served}")
            raise FailedPrecondition(
                f"variant: {name!r} of {self._model.name} is not served by this coordinator: {reason}", field="variant"
            )
        return variant

    def _no_variant(self, images: Collection[str]) -> InvalidInput:
        known = {role for each in self._model.variants for role in (*each.roles.required, *each.roles.optional)}
        field = next((role for role in images if role not in known), "images")
        came = ", ".join(role[:80] for role in images) or "no image"
        takes = ", ".join(each.label for each in self._model.variants)
        unserved = "".join(f"; variant {name} is not served: {why}" for name, why in self._model.unserved.items())
        return InvalidInput(f"{came} came; {self._model.name} takes: {takes}{unserved}", field=field)

    def _check_roles(self, roles: ImageRoles, images: Collection[str]) -> None:
        known = (*roles.required, *roles.optional)
        name = f"{self._model.name} ({self._model.checkpoint.pipeline_name})"
        if images and not known:
            raise InvalidInput(f"{name} takes no images, but {len(images)} came", field="images")
        for role in roles.required:
            if role not in images:
                raise InvalidInput(f"{name} needs a picture as {role!r}, but none came", field=role)
        if unknown := [role for role in images if role not in known]:
            came = ", ".join(images)
            raise InvalidInput(f"{name} takes {', '.join(known)} as pictures, but {came} came", field=unknown[0])


def _takes(roles: ImageRoles, images: Collection[str]) -> bool:
    """Whether these are all images that a request must bring, and none that it may not bring."""
    return set(roles.required) <= set(images) <= {*roles.required, *roles.optional}


def _image_warnings(headers: Mapping[str, ImageHeader]) -> tuple[ParamWarning, ...]:
    message = "has 16-bit grey levels, of which all above 255 become white, as in Diffusers; convert it to 8 bits"
    return tuple(ParamWarning(role, f"{role} {message}") for role, header in headers.items() if header.is_16_bit_grey)
