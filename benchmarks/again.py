"""Starts the running benchmark again, as the ranks that it measures."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from meshwright.launch.local import Launcher
from meshwright.launch.supervise import exit_status


def start_again(ranks: int, arguments: Sequence[str], script: str | None = None) -> None:
    """Run this script (or another) once for each rank, with these arguments. Ends the program if
    one fails."""
    with Launcher() as launcher:
        devices = [f"here:{rank}" for rank in range(ranks)]
        events = launcher.run_command(devices, (sys.executable, script or sys.argv[0], *arguments))
    if exit_status(events):
        sys.exit(exit_status(events))
