"""Validates the custom resources of every overlay against their CRDs: `python tests/k8s/crds.py DIR`.

DIR contains CustomResourceDefinitions as YAML files. Schemas are closed: unknown keys, which an API server would
silently drop, are errors. CEL validation rules are not evaluated. Exit status 1: there is no custom
resource, or there are validation errors, printed one per line. Exit status 2: DIR is invalid; one line has the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from manifests import Manifest, kustomizations, name_of, render

Schemas = Mapping[tuple[str, str], Any]

BUILT_IN_GROUPS = frozenset({"v1", "apps/v1", "autoscaling/v2", "networking.k8s.io/v1", "policy/v1"})


class BadFolder(Exception):
    """A folder without loadable schemas; the message is one line."""


def load_schemas(folder: Path) -> dict[tuple[str, str], Any]:
    """Load the CRDs in a folder's YAML files; returns closed schemas by (apiVersion, kind).

    Raises BadFolder for an unreadable folder or file, for a file that is not a CRD, and for a folder without CRDs.
    """
    schemas: dict[tuple[str, str], Any] = {}
    for path in _yaml_files(folder):
        try:
            for definition in filter(None, yaml.load_all(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)):
                schemas |= _schemas_of(definition)
        except OSError as error:
            raise BadFolder(f"DIR: {path} cannot be read: {error.strerror}; a readable file works") from error
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")
            raise BadFolder(
                f"DIR: {path} is not a CustomResourceDefinition ({reason}); only definitions work"
            ) from error
    if not schemas:
        raise BadFolder(f"DIR: {folder} has no CustomResourceDefinition in *.yaml; a folder of CRDs works")
    return schemas


def _yaml_files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".yaml")
    except OSError as error:
        raise BadFolder(f"DIR: {folder} cannot be read: {error.strerror}; a folder of CRDs works") from error


def _schemas_of(definition: Any) -> dict[tuple[str, str], Any]:
    spec = definition["spec"]
    return {
        (f"{spec['group']}/{version['name']}", spec["names"]["kind"]): closed(version["schema"]["openAPIV3Schema"])
        for version in spec["versions"]
    }


def closed(schema: Any) -> Any:
    """Close a schema: forbid unknown keys of objects with `properties`, except objects that preserve them."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) if key not in ("default", "enum") else value for key, value in schema.items()}
    known = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if known and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = False
    return result


def custom_resources(manifests: Sequence[Manifest]) -> list[Manifest]:
    """Objects of kinds that are not built into Kubernetes."""
    return [each for each in manifests if each["apiVersion"] not in BUILT_IN_GROUPS]


def errors_of(manifest: Manifest, schemas: Schemas) -> Iterator[str]:
    """Validation errors of an object, one line each."""
    key = (manifest["apiVersion"], manifest["kind"])
    if key not in schemas:
        yield f"{name_of(manifest)}: no CustomResourceDefinition of {key[0]} {key[1]}"
        return
    for error in Draft202012Validator(schemas[key]).iter_errors(manifest):
        yield f"{name_of(manifest)}: {error.json_path}: {error.message[:200]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Validate every overlay and print the errors."""
    parser = argparse.ArgumentParser(
        description="Validate the custom resources of every overlay against CRDs; unknown keys are errors."
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of CustomResourceDefinitions, *.yaml")
    try:
        schemas = load_schemas(parser.parse_args(argv).folder)
    except BadFolder as error:
        sys.stderr.write(f"crds.py: {error}\n")
        return 2
    count, found = 0, []
    for path in kustomizations():
        for manifest in custom_resources(render(path)):
            count += 1
            found += [f"{path.name}: {error}" for error in errors_of(manifest, schemas)]
    sys.stderr.write("".join(f"{line}\n" for line in found))
    sys.stdout.write(f"{count} custom resources checked, {len(found)} errors\n")
    return 1 if found or not count else 0


if __name__ == "__main__":
    sys.exit(main())
