"""`fleet models`: lists the served models and the parameters of their requests."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from fleet.v1 import artifacts_pb2, generation_pb2
from services.cli.access import Access, access_of
from services.cli.client import connect
from services.cli.options import SUCCESS, add_endpoint, command_parser, endpoint_of, run_async


def main(argv: Sequence[str]) -> int:
    """Print every model with its parameters and variants; returns the exit code."""
    parser = command_parser("models", "List the models of a running fleet, and the parameters of their requests.")
    add_endpoint(parser)
    args = parser.parse_args(argv)
    return run_async(_models(endpoint_of(args.endpoint), access_of(args)))


async def _models(endpoint: str, access: Access) -> int:
    async with connect(endpoint, access) as client:
        models = await client.models()
    for model in models:
        sys.stdout.write("".join(f"{line}\n" for line in lines_of(model)))
    return SUCCESS


def lines_of(model: generation_pb2.Model) -> Iterator[str]:
    """The lines of a model: its parameters and its named variants."""
    yield f"{model.name} ({model.pipeline_name}), checkpoint {model.fingerprint[:12]}"
    for parameter in model.parameters:
        yield f"  {_line(parameter)}"
    for variant in model.variants:
        if variant.error:
            yield f"  variant {variant.name} is not served: {variant.error}"
        elif variant.name:
            yield from _variant_lines(model, variant)


def _variant_lines(model: generation_pb2.Model, variant: generation_pb2.Variant) -> Iterator[str]:
    """Images and services of a variant, and the parameters that differ from the model's."""
    images = [*variant.required_images, *(f"optional {role}" for role in variant.optional_images)]
    yield f"  variant {variant.name}: {', '.join(images) or 'no images'}; services {', '.join(variant.services)}"
    common = list(model.parameters)
    for parameter in variant.parameters:
        if parameter.type != "image" and parameter not in common:
            yield f"    {_line(parameter)}"


def _line(parameter: generation_pb2.Parameter) -> str:
    default = f" = {value_text(parameter.default_value)}" if parameter.HasField("default_value") else ""
    return f"{parameter.name}: {parameter.type}{default}  {parameter.description}".rstrip()


def value_text(value: artifacts_pb2.ParamValue) -> str:
    """A parameter value in the syntax of --param."""
    match value.WhichOneof("kind"):
        case "bool_value":
            return "true" if value.bool_value else "false"
        case "int_value":
            return str(value.int_value)
        case "double_value":
            return f"{value.double_value:g}"
        case "doubles_value":
            return "[" + ", ".join(f"{each:g}" for each in value.doubles_value.values) + "]"
        case _:
            return repr(value.string_value)
