"""Tests of crds.py, on a small artificial CRD."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import crds
import pytest
import yaml
from manifests import Manifest

WIDGETS: dict[str, Any] = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "spec": {
        "group": "example.com",
        "names": {"kind": "Widget"},
        "versions": [
            {
                "name": "v1",
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "apiVersion": {"type": "string"},
                            "kind": {"type": "string"},
                            "metadata": {"type": "object"},
                            "spec": {
                                "type": "object",
                                "required": ["size"],
                                "properties": {
                                    "size": {"type": "integer"},
                                    "parts": {
                                        "type": "array",
                                        "items": {"type": "object", "properties": {"name": {"type": "string"}}},
                                    },
                                    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                                    "free": {
                                        "type": "object",
                                        "properties": {"a": {"type": "string"}},
                                        "x-kubernetes-preserve-unknown-fields": True,
                                    },
                                },
                            },
                        },
                    }
                },
            }
        ],
    },
}
WIDGET: Manifest = {
    "apiVersion": "example.com/v1",
    "kind": "Widget",
    "metadata": {"name": "one", "labels": {"a": "b"}},
    "spec": {"size": 1, "parts": [{"name": "x"}], "labels": {"any": "thing"}, "free": {"b": 2}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "widgets.yaml").write_text(yaml.safe_dump(WIDGETS))
    return tmp_path


def test_a_valid_object_has_no_errors(folder: Path) -> None:
    assert list(crds.errors_of(WIDGET, crds.load_schemas(folder))) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"sise": 1}, "sise"),
        ({"size": "1"}, "'1' is not of type"),
        ({"parts": [{"nam": "x"}]}, "nam"),
        ({"labels": {"a": 1}}, "1 is not of type"),
    ],
)
def test_an_invalid_object_has_an_error(folder: Path, change: Manifest, error: str) -> None:
    widget = copy.deepcopy(WIDGET)
    widget["spec"] |= change
    found = list(crds.errors_of(widget, crds.load_schemas(folder)))
    assert len(found) == 1
    assert found[0].startswith("Widget/one: $.spec")
    assert error in found[0]


def test_an_object_without_a_crd_is_an_error(folder: Path) -> None:
    (error,) = crds.errors_of(WIDGET | {"kind": "Gadget"}, crds.load_schemas(folder))
    assert error == "Gadget/one: no CustomResourceDefinition of example.com/v1 Gadget"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "widgets cannot be read: No such file or directory; a folder of CRDs works"),
        ({}, "widgets has no CustomResourceDefinition in *.yaml; a folder of CRDs works"),
        ({"a.yaml": b"a: [1"}, "widgets/a.yaml is not a CustomResourceDefinition (ParserError"),
        ({"a.yaml": b"\xff\xfe\xff"}, "widgets/a.yaml is not a CustomResourceDefinition ("),
        ({"a.yaml": b"kind: Widget"}, "widgets/a.yaml is not a CustomResourceDefinition (KeyError: 'spec')"),
        ({"a.yaml": b"- one"}, "widgets/a.yaml is not a CustomResourceDefinition (TypeError"),
        ({"a.yaml": b"---"}, "widgets has no CustomResourceDefinition in *.yaml"),
    ],
)
def test_an_invalid_folder_is_reported_in_one_line_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: dict[str, bytes] | None, message: str
) -> None:
    folder = tmp_path / "widgets"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    assert crds.main([str(folder)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"crds.py: DIR: {tmp_path}")
    assert message in err


def test_a_file_instead_of_a_folder_and_an_unreadable_file_are_reported(folder: Path) -> None:
    with pytest.raises(crds.BadFolder, match=r"widgets\.yaml cannot be read: Not a directory"):
        crds.load_schemas(folder / "widgets.yaml")
    (folder / "broken.yaml").symlink_to(folder / "nowhere")
    with pytest.raises(crds.BadFolder, match=r"broken\.yaml cannot be read: No such file"):
        crds.load_schemas(folder)


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["one", "two"], 2)])
def test_help_and_wrong_arguments_print_the_usage(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        crds.main(arguments)
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert (out + err).startswith("usage: ")


def test_the_program_reports_each_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "not-checked"}}
    wrong = WIDGET | {"spec": {"size": 1, "more": 2}}
    monkeypatch.setattr(crds, "kustomizations", lambda: [Path("one"), Path("two")])
    monkeypatch.setattr(crds, "render", lambda path: [deployment, wrong if path.name == "two" else WIDGET])
    assert crds.main([str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == "2 custom resources checked, 1 errors\n"
    assert err.startswith("two: Widget/one: $.spec: Additional properties")
    monkeypatch.setattr(crds, "render", lambda _: [WIDGET])
    assert crds.main([str(folder)]) == 0
