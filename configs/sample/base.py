"""Sampling parameters: one frozen dataclass per family defines names, defaults, bounds and rounding.

Each field is a parameter with its Diffusers name. The annotation is the type, `parameter()` sets description and
bounds, and a subclass overrides a default by assignment. The fields determine the reply of ListModels, the validation,
and the artifact that carries each value.
"""

from __future__ import annotations

import difflib
import math
import secrets
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar

from common.artifacts import Canvas, ParamValue, Prompt, Sampling
from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from common.image_header import ImageHeader

# Drawn seeds are short, so that users can type them and every client language can represent them.
_DRAWN_SEED_BITS = 32
_MAX_SEED = 2**63 - 1
_MAX_STEPS = 1000
_MAX_LIST_LENGTH = _MAX_STEPS
_MAX_SCALE = 1000.0

_TYPES = {"str": "string", "int": "int", "float": "float", "bool": "bool", "tuple[float, ...]": "floats"}
_NOUNS = {"string": "a text", "int": "a whole number", "float": "a finite number", "bool": "true or false"}

_Artifact = TypeVar("_Artifact", Prompt, Canvas, Sampling)


@dataclass(frozen=True)
class ParameterSpec:
    """Description of a parameter for clients.

    `type` is "string", "int", "float", "bool", "floats" or "image"; bounds are inclusive.
    """

    name: str
    type: str
    default: ParamValue | None
    description: str
    minimum: float | None = None
    maximum: float | None = None
    unset: str = ""
    """Effect of an unset parameter; empty: the default value is used."""

    @property
    def expected(self) -> str:
        """The rule for valid values, which completes the sentence "VALUE is not ..."."""
        noun = _NOUNS.get(self.type, "a list of finite numbers")
        if self.minimum is None and self.maximum is None:
            return noun
        if self.maximum is None:
            return f"{noun}, at least {self.minimum}"
        return f"{noun} from {self.minimum} to {self.maximum}"


@dataclass(frozen=True)
class ImageRoles:
    """Roles of a request's images: "image", "image_1" ..., "last_image"."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParamWarning:
    """A warning about a value that was changed or has no effect. `message` does not repeat the field."""

    field: str
    message: str


def parameter(
    description: str,
    default: Any = MISSING,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    unset: str = "",
) -> Any:
    """A dataclass field of a parameter. Without a default, the checkpoint or the caller must set a value."""
    metadata = {"description": description, "minimum": minimum, "maximum": maximum, "unset": unset}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of all families. Create instances by build(), which validates the values.

    The first of `output_formats` is the default. Bounds protect the workers' memory: `max_text_bytes` of UTF-8 per
    text, `max_total_pixels` over all outputs.
    """

    output_formats: ClassVar[tuple[str, ...]] = ("png", "safetensors")
    max_text_bytes: ClassVar[int] = 64 * 1024
    max_total_pixels: ClassVar[int] = 2**24

    prompt: str = parameter("Text prompt.")
    negative_prompt: str | None = parameter("Negative text prompt.", None)
    height: int = parameter("Height in pixels.", minimum=1, maximum=8192)
    width: int = parameter("Width in pixels.", minimum=1, maximum=8192)
    num_inference_steps: int = parameter("Steps of the denoising loop.", minimum=1, maximum=_MAX_STEPS)
    guidance_scale: float = parameter("Strength of guidance by the prompt.", minimum=0.0, maximum=_MAX_SCALE)
    seed: int = parameter(
        "Seed of the noise; drawn at random if unset.", minimum=0, maximum=_MAX_SEED, unset="a random seed is drawn"
    )
    num_outputs_per_prompt: int = parameter(
        "Number of outputs; one generator draws their noise.", 1, minimum=1, maximum=64
    )
    output_format: str = parameter("File format of the result.", "png")

    @classmethod
    def build(
        cls,
        given: Mapping[str, ParamValue],
        checkpoint: Checkpoint,
        images: Mapping[str, ImageHeader] = MappingProxyType({}),
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Complete the caller's values with the defaults of checkpoint and family, and validate all values.

        Returns the parameters and warnings about changed values. Raises InvalidInput, which states the field, the value
        and valid values.
        """
        specs = {spec.name: spec for spec in cls.parameters(checkpoint)}
        for name in given:
            if name not in specs:
                raise InvalidInput(_unknown(name, specs, checkpoint.pipeline_name), field=name)
        values = {name: spec.default for name, spec in specs.items() if spec.default is not None}
        from_images = cls.image_defaults(images, {**values, **given})
        values |= {"seed": secrets.randbits(_DRAWN_SEED_BITS), **values, **from_images, **given}
        for name in specs:
            if name in values:
                values[name] = cls._checked(specs[name], values[name])
            elif name not in cls._nullable():
                raise InvalidInput(f"{name}: the value is missing; {specs[name].expected} works", field=name)
        whole: dict[str, Any] = {**dict.fromkeys(cls._nullable()), **values}
        params, warnings = cls(**whole).round_and_validate(checkpoint, frozenset(given))
        params._check_total_pixels()
        return params, warnings

    @classmethod
    def parameters(cls, checkpoint: Checkpoint | None = None) -> tuple[ParameterSpec, ...]:
        """All parameters with their defaults; the checkpoint's default overrides the family's."""
        defaults: dict[str, ParamValue] = {}
        for item in fields(cls):
            if item.default is not MISSING and item.default not in (None, ()):
                defaults[item.name] = item.default
        if "output_format" in defaults:
            defaults["output_format"] = cls.output_formats[0]
        if checkpoint is not None:
            defaults |= {**cls.model_defaults(checkpoint), **checkpoint.sampling_defaults}
        specs = tuple(cls._spec(item, defaults.get(item.name)) for item in fields(cls))
        if unknown := defaults.keys() - {spec.name for spec in specs}:
            raise InvalidInput(
                f"{min(unknown)!r} is not a parameter; parameters are {', '.join(spec.name for spec in specs)}",
                field=min(unknown),
            )
        return specs

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """Required and optional image roles of a request; by default none."""
        del checkpoint
        return ImageRoles()

    @classmethod
    def image_defaults(
        cls, images: Mapping[str, ImageHeader], values: Mapping[str, ParamValue]
    ) -> dict[str, ParamValue]:
        """Defaults that depend on the request's images, such as the output size.

        `values` contains the caller's unvalidated values, and all other defaults. Raises InvalidInput.
        """
        del images, values
        return {}

    @classmethod
    def model_defaults(cls, checkpoint: Checkpoint) -> dict[str, ParamValue]:
        """Defaults that depend on the checkpoint's architecture, such as its native size."""
        del checkpoint
        return {}

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Round values to supported values as the Diffusers pipeline does, with warnings.

        `given` are the names of the caller's values. Raises InvalidInput for values that rounding cannot correct.
        """
        del checkpoint, given
        return self, ()

    def floored_size(self, multiple: int) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Round height and width down to a multiple (pixels). Raises InvalidInput for a size below the multiple."""
        warnings = []
        sizes = {"height": self.height, "width": self.width}
        for name, asked in sizes.items():
            sizes[name] = asked // multiple * multiple
            if not sizes[name]:
                message = f"{name}: {asked} is not at least {multiple}; multiples of {multiple} work"
                raise InvalidInput(message, field=name)
            if sizes[name] != asked:
                message = f"{asked} is not a multiple of {multiple}; {sizes[name]} is used instead"
                warnings.append(ParamWarning(name, message))
        return replace(self, height=sizes["height"], width=sizes["width"]), tuple(warnings)

    @property
    def extent(self) -> dict[str, int]:
        """Dimensions whose product is the number of pixels of one output, by name."""
        return {"height": self.height, "width": self.width}

    @property
    def branches(self) -> int:
        """Number of guidance branches that a step computes; 1 without guidance."""
        return 1

    def as_mapping(self) -> dict[str, ParamValue]:
        """All set values by name, as stored in request records and as accepted by build()."""
        values = {item.name: vars(self)[item.name] for item in fields(self)}
        return {name: value for name, value in values.items() if value not in (None, ())}

    def artifacts(self) -> dict[str, Prompt | Canvas | Sampling]:
        """The values as artifacts, by slot. Values without a field in any artifact are in Sampling.params."""
        values: dict[str, Any] = self.as_mapping()
        prompt, canvas = _take(Prompt, values), _take(Canvas, values)
        shared = {item.name for item in fields(Sampling)}
        own = {name: values.pop(name) for name in list(values) if name not in shared}
        return {"prompt": prompt, "canvas": canvas, "sampling": _take(Sampling, {**values, "params": own})}

    @classmethod
    def _spec(cls, item: Field[Any], default: ParamValue | None) -> ParameterSpec:
        """Build a spec with the nearest base class's metadata; a subclass may override only the default."""
        annotation = str(item.type).removesuffix(" | None")
        for base in cls.__mro__:
            declared = vars(base).get("__dataclass_fields__", {}).get(item.name)
            if declared is not None and declared.metadata and annotation in _TYPES:
                return ParameterSpec(item.name, _TYPES[annotation], default, **declared.metadata)
        raise TypeError(f"{cls.__name__}.{item.name}: {item.type} is not declared by parameter() with a known type")

    @classmethod
    def _nullable(cls) -> frozenset[str]:
        return frozenset(item.name for item in fields(cls) if item.default in (None, ()))

    @classmethod
    def _checked(cls, spec: ParameterSpec, value: ParamValue) -> ParamValue:
        if spec.type == "string":
            return cls._checked_text(spec, value)
        if spec.type == "floats":
            if not isinstance(value, tuple | list):
                raise _refusal(spec, value)
            if len(value) > _MAX_LIST_LENGTH:
                message = f"{spec.name}: {len(value)} values are not at most {_MAX_LIST_LENGTH}"
                raise InvalidInput(message, field=spec.name)
            return tuple(float(_checked_number(spec, each)) for each in value)
        if spec.type == "bool":
            if not isinstance(value, bool):
                raise _refusal(spec, value)
            return value
        return _checked_number(spec, value)

    @classmethod
    def _checked_text(cls, spec: ParameterSpec, value: ParamValue) -> str:
        if not isinstance(value, str):
            raise _refusal(spec, value)
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise InvalidInput(f"{spec.name}: the text is not valid Unicode", field=spec.name) from None
        if size > cls.max_text_bytes:
            message = f"{spec.name}: {size} bytes of UTF-8 are not at most {cls.max_text_bytes}"
            raise InvalidInput(message, field=spec.name)
        if spec.name == "output_format" and value not in cls.output_formats:
            message = (
                f"output_format: {_shown(value)} is not {' or '.join(cls.output_formats)}, the formats of this model"
            )
            raise InvalidInput(message, field=spec.name)
        return value

    def _check_total_pixels(self) -> None:
        area, limit = math.prod(self.extent.values()), self.max_total_pixels
        size = " x ".join(map(str, self.extent.values()))
        if area > limit:
            message = f"{' x '.join(self.extent)}: {size} pixels are not at most {limit}"
            raise InvalidInput(message, field="height")
        if area * self.num_outputs_per_prompt > limit:
            message = f"num_outputs_per_prompt: {self.num_outputs_per_prompt} is not at most {limit // area} at {size}"
            raise InvalidInput(message, field="num_outputs_per_prompt")


def warnings_without_effect(reasons: Mapping[str, str], given: Collection[str]) -> tuple[ParamWarning, ...]:
    """Warnings about the caller's parameters that have no effect. `reasons` is keyed by parameter name."""
    return tuple(ParamWarning(name, f"no effect {why}") for name, why in reasons.items() if name in given)


def _checked_number(spec: ParameterSpec, value: object) -> int | float:
    """Validate a number: an int for type "int", otherwise a finite float; booleans are rejected."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refusal(spec, value)
    if isinstance(value, float) and (spec.type == "int" or not math.isfinite(value)):
        raise _refusal(spec, value)
    low = -math.inf if spec.minimum is None else spec.minimum
    high = math.inf if spec.maximum is None else spec.maximum
    if not low <= value <= high:
        raise _refusal(spec, value)
    return value if spec.type == "int" else float(value)


def _refusal(spec: ParameterSpec, value: object) -> InvalidInput:
    unset = spec.unset or (f"{_shown(spec.default)} is used" if spec.default not in (None, "", ()) else "")
    hint = f"; if it is unset, {unset}" if unset else ""
    return InvalidInput(f"{spec.name}: {_shown(value)} is not {spec.expected}{hint}", field=spec.name)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown(name: str, known: Collection[str], pipeline_name: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{pipeline_name} has no parameter {_shown(name)}{hint}; its parameters are {', '.join(known)}"


def _take(artifact: type[_Artifact], values: dict[str, Any]) -> _Artifact:
    """Build an artifact from the values of its fields, and remove these values."""
    return artifact(**{item.name: values.pop(item.name) for item in fields(artifact) if item.name in values})
