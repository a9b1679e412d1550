"""Runs files for tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from meshwright.recorded.files import read_runs
from meshwright.recorded.spec import RecordedRun

PLAIN = {
    "run": "a",
    "framework": "pytorch",
    "model": "gpt2",
    "sequence": "1024",
    "precision": "fp16",
    "device": "V100-32",
    "devices": "8",
    "devices_per_node": "8",
    "data": "2",
    "tensor": "2",
    "stages": "2",
    "rows": "2",
    "global_batch": "32",
    "step": "900 ms",
    "memory": "20 GiB",
}
"""A run that is in order."""


def write_cells(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    """A runs file with these cells; the columns are those of all rows together."""
    every = list(rows)
    names = list(dict.fromkeys(name for row in every for name in row))
    lines = [",".join(names)] + [",".join(row.get(name, "") for name in names) for row in every]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_cells(folder: Path, **cells: str) -> RecordedRun:
    """The run of PLAIN with other cells."""
    (run,) = read_runs(write_cells(folder / "runs.csv", [PLAIN | cells]))
    return run
