"""Converts flags to the parameters of a request.

Parameters without a flag stay unset, so that the model's defaults apply. `--param KEY=VALUE` sets any other argument of
the model's Diffusers call. The coordinator checks that the model accepts it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from common.artifacts import ParamValue
from common.codec import write_param
from common.errors import InvalidInput
from common.settings import FlagParser
from fleet.v1 import generation_pb2

FORMATS = {
    ".png": generation_pb2.OUTPUT_FORMAT_PNG,
    ".mp4": generation_pb2.OUTPUT_FORMAT_MP4,
    ".safetensors": generation_pb2.OUTPUT_FORMAT_SAFETENSORS,
}
IMAGE_PARAMS = ("image", "last_image", "mask_image")
_DIFFUSERS_NAMES = {
    "num_images_per_prompt": "num_outputs_per_prompt",
    "num_videos_per_prompt": "num_outputs_per_prompt",
}
_MESSAGE_FIELDS = {
    name: field
    for name, field in generation_pb2.GenerationParameters.DESCRIPTOR.fields_by_name.items()
    if field.has_presence and field.message_type is None
}
_PYTHON_TYPES = {
    FieldDescriptor.CPPTYPE_STRING: ((str,), "a text"),
    FieldDescriptor.CPPTYPE_INT64: ((int,), "a whole number"),
    FieldDescriptor.CPPTYPE_DOUBLE: ((int, float), "a number"),
}


def whole_number(text: str) -> int:
    """Parse an int for argparse, with a readable message."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def number(text: str) -> float:
    """Parse a float for argparse, with a readable message."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def add_parameters(parser: FlagParser) -> None:
    """Add the sampling flags. Their destinations are the Diffusers names of the parameters."""
    parser.add_argument("prompt", metavar="PROMPT", help="text to generate from")
    parser.add_argument("--negative-prompt", metavar="T", help="text to steer away from")
    parser.add_argument("--seed", type=whole_number, metavar="N", help="seed of the random generator (default: random)")
    parser.add_argument("--num-inference-steps", type=whole_number, metavar="N", help="steps of the denoising loop")
    parser.add_argument(
        "--guidance-scale", type=number, metavar="X", help="scale of guidance, distilled or classifier-free"
    )
    parser.add_argument(
        "--true-cfg-scale", type=number, metavar="X", help="scale of classifier-free guidance, which is enabled above 1"
    )
    parser.add_argument("--height", type=whole_number, metavar="H", help="height in pixels")
    parser.add_argument("--width", type=whole_number, metavar="W", help="width in pixels")
    parser.add_argument("--num-frames", type=whole_number, metavar="F", help="number of frames of a video")
    parser.add_argument(
        "--image", action="append", default=[], type=Path, metavar="FILE", help="input image; repeatable"
    )
    parser.add_argument(
        "--num-outputs",
        dest="num_outputs_per_prompt",
        type=whole_number,
        metavar="N",
        help="images per prompt, all from one random generator; written to NAME-0.png, NAME-1.png ...",
    )
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another argument of the model's Diffusers call; VALUE is JSON, else text; repeatable",
    )


def given_parameters(args: argparse.Namespace) -> dict[str, ParamValue]:
    """The parameters that are set, by Diffusers name. Raises InvalidInput for a malformed or repeated value."""
    flags: Mapping[str, Any] = vars(args)
    given: dict[str, ParamValue] = {name: flags[name] for name in _MESSAGE_FIELDS if flags.get(name) is not None}
    for text in args.param:
        key, equals, value = text.partition("=")
        if not (equals and key):
            raise InvalidInput(f"--param: {text!r} is not KEY=VALUE; guidance_scale=3.5 works", field="param")
        name = _DIFFUSERS_NAMES.get(key, key)
        if name in given:
            raise InvalidInput(f"{name}: the parameter is given twice; once works", field=name)
        if key not in IMAGE_PARAMS:
            given[name] = _param_value(key, value)
    for name, each in given.items():
        _check(name, each)
    return given


def _param_value(key: str, text: str) -> ParamValue:
    """Decode as JSON where possible, else return the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, list) and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value):
        return tuple(float(x) for x in value)
    if isinstance(value, (bool, int, float, str)):
        return value
    raise InvalidInput(
        f"--param {key}: {text} is not a text, a number, true, false or a list of numbers; [1, 0.5] works", field=key
    )


def _check(name: str, value: ParamValue) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidInput(f"{name}: the text is not valid UTF-8", field=name) from None
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InvalidInput(f"{name}: {value} is not a signed 64-bit integer", field=name)
    if field := _MESSAGE_FIELDS.get(name):
        types, expected = _PYTHON_TYPES[field.cpp_type]
        if not isinstance(value, types) or isinstance(value, bool):
            raise InvalidInput(f"{name}: {value!r} is not {expected}", field=name)


def given_images(args: argparse.Namespace) -> list[tuple[str, bytes]]:
    """Images by role, from the files of --image and of image arguments in --param. Raises InvalidInput."""
    named: list[tuple[str, Path]] = [("image" if i == 0 else f"image_{i}", path) for i, path in enumerate(args.image)]
    for text in args.param:
        key, _, value = text.partition("=")
        if key in IMAGE_PARAMS:
            named.append((key, Path(value)))
    files: list[tuple[str, bytes]] = []
    for role, path in named:
        if role in dict(files):
            raise InvalidInput(f"{role}: the image is given twice; once works", field=role)
        try:
            files.append((role, path.read_bytes()))
        except OSError as error:
            raise InvalidInput(f"cannot read the image {path}: {error.strerror}", field=role) from error
    return files


def parameters_message(
    given: Mapping[str, ParamValue], images: Sequence[tuple[str, bytes]], suffix: str
) -> generation_pb2.GenerationParameters:
    """The parameters as a message: in the field of the same name, else in `params`."""
    message = generation_pb2.GenerationParameters(
        output_format=FORMATS[suffix],
        images=[generation_pb2.ImageInput(role=role, data=data) for role, data in images],
        params={name: write_param(name, value) for name, value in given.items() if name not in _MESSAGE_FIELDS},
    )
    named: dict[str, Any] = {name: value for name, value in given.items() if name in _MESSAGE_FIELDS}
    message.MergeFrom(generation_pb2.GenerationParameters(**named))
    return message
