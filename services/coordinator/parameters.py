"""Converts sampling parameters between the public API's message and values by name."""

from __future__ import annotations

from collections.abc import Mapping

from common.artifacts import ParamValue
from common.codec import read_param, write_param
from common.errors import InvalidInput
from common.image_header import MAX_IMAGES
from fleet.v1 import generation_pb2

_FORMATS = {
    generation_pb2.OUTPUT_FORMAT_PNG: "png",
    generation_pb2.OUTPUT_FORMAT_MP4: "mp4",
    generation_pb2.OUTPUT_FORMAT_SAFETENSORS: "safetensors",
}
_FORMAT_NUMBERS = {name: number for number, name in _FORMATS.items()}
_FORMAT = "output_format"
_NOT_SCALAR = ("images", "params")


def given_parameters(message: generation_pb2.GenerationParameters) -> dict[str, ParamValue]:
    """The parameters that the caller set, by name. Raises InvalidInput for an unknown format or a repeated name."""
    given: dict[str, ParamValue] = {
        descriptor.name: value
        for descriptor, value in message.ListFields()
        if descriptor.name not in _NOT_SCALAR and descriptor.name != _FORMAT
    }
    if message.output_format:
        if message.output_format not in _FORMATS:
            raise InvalidInput(
                f"output_format: {message.output_format} is not a format; {', '.join(_FORMAT_NUMBERS)} work",
                field=_FORMAT,
            )
        given[_FORMAT] = _FORMATS[message.output_format]
    for name in sorted(message.params):
        if name in message.DESCRIPTOR.fields_by_name:
            raise InvalidInput(f"{name} has its own field in the message; set that field instead of params", field=name)
        given[name] = read_param(name, message.params[name])
    return given


def given_images(message: generation_pb2.GenerationParameters) -> dict[str, bytes]:
    """The images by role. Raises InvalidInput for a repeated role, or for too many images."""
    if len(message.images) > MAX_IMAGES:
        raise InvalidInput(
            f"{len(message.images)} images are too many; at most {MAX_IMAGES} are accepted", field="images"
        )
    images: dict[str, bytes] = {}
    for image in message.images:
        role = image.role or "image"
        if role in images:
            raise InvalidInput(
                f"images: {role[:80]!r} is the role of two images; give each image its own", field="images"
            )
        images[role] = image.data
    return images


def recorded_parameters(values: Mapping[str, ParamValue]) -> generation_pb2.GenerationParameters:
    """The message with all parameter values of a validated request, including defaults."""
    message = generation_pb2.GenerationParameters()
    for name, value in values.items():
        if name == _FORMAT:
            message.output_format = _FORMAT_NUMBERS[str(value)]
        elif name in message.DESCRIPTOR.fields_by_name:
            setattr(message, name, value)
        else:
            message.params[name].CopyFrom(write_param(name, value))
    return message
