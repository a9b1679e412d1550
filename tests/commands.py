"""Runs the command line in a process of its own, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


def meshwright(*arguments: str, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess:
    """`meshwright ARGUMENTS` in a folder, on a terminal of 80 columns."""
    return subprocess.run(
        [sys.executable, "-m", "meshwright", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "COLUMNS": "80"},
    )


def refused(line: str, words: Iterable[str], *, cwd: Path) -> None:
    """A mistake of the user's ends with a message that holds these words, without a traceback."""
    done = meshwright(*line.split(), cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
