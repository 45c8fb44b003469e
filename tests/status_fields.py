"""Writes the table of `fleet status --json` in services/README.md: `python tests/status_fields.py`."""

from __future__ import annotations

from generated_part import GeneratedPart, markdown
from readme import ROOT
from services.cli.status_json import FIELDS

README = ROOT / "services" / "README.md"
PART = GeneratedPart(
    README, "<!-- status fields: `poe status-fields` writes this table -->\n", "<!-- end of status fields -->\n"
)


def table() -> str:
    """The Markdown table of all fields."""
    rows = [("Field", "Meaning"), ("---",) * 2]
    rows += [(f"`{path}`", meaning) for path, meaning in FIELDS.items()]
    return markdown(rows)


if __name__ == "__main__":
    PART.write(table())
