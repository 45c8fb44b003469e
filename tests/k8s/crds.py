"""Checks the custom resources of every overlay against the schemas of their CRDs: `python tests/k8s/crds.py DIR`.

DIR holds CustomResourceDefinitions as YAML. Schemas are closed: a key that a schema does not have is refused, which an
API server would silently drop. Validation rules in CEL are not evaluated. Exit code 1: a line for each error. Exit code
2: one line that says why DIR cannot be used.
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
    """A folder from which no schemas can be loaded; the message is one line that says what works."""


def load_schemas(folder: Path) -> dict[tuple[str, str], Any]:
    """Closed schemas by apiVersion and kind, of the CRDs in the YAML files of a folder.

    Raises BadFolder for a folder or a file that cannot be read, and for a folder without CRDs.
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
    """The schema with unknown keys refused wherever it lists the known ones and does not preserve others."""
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
    """The objects that are not built into Kubernetes."""
    return [each for each in manifests if each["apiVersion"] not in BUILT_IN_GROUPS]


def errors_of(manifest: Manifest, schemas: Schemas) -> Iterator[str]:
    """A line for each place where an object does not fit its schema."""
    key = (manifest["apiVersion"], manifest["kind"])
    if key not in schemas:
        yield f"{name_of(manifest)}: no CustomResourceDefinition of {key[0]} {key[1]}"
        return
    for error in Draft202012Validator(schemas[key]).iter_errors(manifest):
        yield f"{name_of(manifest)}: {error.json_path}: {error.message[:200]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Check every overlay and print the errors."""
    parser = argparse.ArgumentParser(
        description="Check the custom resources of every overlay against CRDs, unknown keys refused."
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
