"""Command line of the chaos programs: the parser, and the output and exit code of a run."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that prints the description unchanged and refuses abbreviated flags."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def explain_findings(details: Sequence[str], findings: Sequence[str], directory: Path, title: str = "findings") -> str:
    """Format the findings and the details of their causes. `directory` contains the logs."""
    return "\n".join((*details, f"{title} (logs are in {directory}):", *findings))


def end_run(summary: str, explanation: str, directory: Path) -> int:
    """Print the result of a run and return the exit code.

    A run without findings has an empty `explanation`; the directory of its logs is deleted.
    """
    sys.stdout.write(f"{summary}\n")
    if explanation:
        sys.stdout.write(f"{explanation}\n")
        return 1
    shutil.rmtree(directory)
    return 0
