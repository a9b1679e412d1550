"""The command line: one function per verb."""

from __future__ import annotations

import sys

from meshwright.cli import planning, running, testbed
from meshwright.cli.options import app

__all__ = ["app", "main", "planning", "running", "testbed"]


def main() -> None:
    """Entry point: a user's mistake ends with its message and status 2, never a traceback."""
    from meshwright.errors import MeshwrightError

    try:
        app()
    except MeshwrightError as error:
        sys.stderr.write(f"{type(error).__name__}:\n{error}\n")
        sys.exit(2)
