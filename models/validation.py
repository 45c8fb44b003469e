"""Validates requests for the coordinator and creates the initial artifacts of their pipelines."""

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
    """A valid request: its variant, all parameters, the initial artifacts of its pipeline, and warnings."""

    variant: ServedVariant
    params: SamplingParams
    artifacts: Mapping[str, object]
    warnings: tuple[ParamWarning, ...]


class InputValidationStage:
    """Creates the initial artifacts of a model's pipeline from a request.

    Raises PipelineError for a pipeline that requires other kinds of initial artifacts.
    """

    def __init__(self, model: ServedModel) -> None:
        if unknown := sorted(
            {kind for each in model.variants for kind in each.pipeline.given.values()} - _INITIAL_ARTIFACTS
        ):
            made = ", ".join(sorted(_INITIAL_ARTIFACTS))
            raise PipelineError(f"given: {', '.join(unknown)} cannot be created from a request; {made} can")
        self._model = model

    def choose(self, given: Collection[str], images: Collection[str], recorded: str = "") -> ServedVariant:
        """Select the variant for a request's parameters and image roles.

        Selects the first variant that accepts the images and has all parameters; if there is none, the first variant
        that accepts the images. `recorded` is the variant selected when the request was accepted; empty: none yet.
        Raises InvalidInput, which lists the variants and their images, if no variant accepts the images, and
        FailedPrecondition if the recorded variant is not served here.
        """
        if recorded:
            return self._recorded(recorded)
        if len(self._model.variants) == 1 and not self._model.unserved:
            (variant,) = self._model.variants
            self._check_roles(variant.roles, images)
            return variant
        fits = [each for each in self._model.variants if _accepts(each.roles, images)]
        if not fits:
            raise self._no_variant(images)
        return next((each for each in fits if {spec.name for spec in each.specs}.issuperset(given)), fits[0])

    def run(
        self, given: Mapping[str, ParamValue], images: Mapping[str, bytes] = _NO_IMAGES, *, recorded: str = ""
    ) -> ValidatedRequest:
        """Validate a request and fill in defaults. `images` are the request's image files by role.

        Reads only the headers of the images. `recorded` is the variant of a request accepted earlier. Raises
        InvalidInput, which states the field, the value and valid values, and FailedPrecondition as choose() does.
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
                f"variant: {name!r} of {self._model.name} is not served by this coordinator; {reason}", field="variant"
            )
        return variant

    def _no_variant(self, images: Collection[str]) -> InvalidInput:
        known = {role for each in self._model.variants for role in (*each.roles.required, *each.roles.optional)}
        field = next((role for role in images if role not in known), "images")
        sent = ", ".join(role[:80] for role in images) or "no image"
        accepted = ", ".join(each.label for each in self._model.variants)
        unserved = "".join(f"; variant {name} is not served: {why}" for name, why in self._model.unserved.items())
        return InvalidInput(
            f"images: {sent} is not a set of images of {self._model.name}, which takes: {accepted}{unserved}",
            field=field,
        )

    def _check_roles(self, roles: ImageRoles, images: Collection[str]) -> None:
        known = (*roles.required, *roles.optional)
        name = f"{self._model.name} ({self._model.checkpoint.pipeline_name})"
        if images and not known:
            raise InvalidInput(f"images: {len(images)} is not 0; {name} takes no images", field="images")
        for role in roles.required:
            if role not in images:
                raise InvalidInput(
                    f"{role}: no image was sent; {name} requires an image with the role {role!r}",
                    field=role,
                )
        if unknown := [role for role in images if role not in known]:
            sent = ", ".join(images)
            raise InvalidInput(
                f"images: {sent} is not a set of images of {name}, which takes: {', '.join(known)}", field=unknown[0]
            )


def _accepts(roles: ImageRoles, images: Collection[str]) -> bool:
    """Whether the images include all required roles, and only required or optional roles."""
    return set(roles.required) <= set(images) <= {*roles.required, *roles.optional}


def _image_warnings(headers: Mapping[str, ImageHeader]) -> tuple[ParamWarning, ...]:
    message = "has 16-bit gray levels; levels above 255 become white, as in Diffusers; convert it to 8 bits"
    return tuple(
        ParamWarning(role, f"the image {message}") for role, header in headers.items() if header.is_16_bit_gray
    )
