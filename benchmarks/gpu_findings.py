"""What one case of gpu.py finds: a table, notes, and the checks that did not hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Value = str | float | int | bool | None
"""A cell of a table; None: it was not measured on this device."""


class Findings:
    """Is written to its file after every row: a case that is stopped leaves what it had found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: tuple[str, ...] = ()
        """Each with the unit of its figures, such as `ours, ms`."""
        self.rows: list[tuple[Value, ...]] = []
        self.notes: list[str] = []
        self.problems: list[str] = []

    def table(self, *columns: str) -> None:
        """Begin the table."""
        self.columns = columns
        self._save()

    def row(self, *values: Value) -> None:
        """Add a row, with as many figures as there are columns."""
        assert len(values) == len(self.columns), (self.columns, values)
        self.rows.append(values)
        self._save()

    def note(self, words: str) -> None:
        """Add a sentence that readers of the table need."""
        self.notes.append(words)
        self._save()

    def check(self, holds: bool, words: str) -> None:
        """Note what does not hold; the case goes on, and has failed."""
        if not holds:
            self.problems.append(words)
            self._save()

    def _save(self) -> None:
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(self.plain()), encoding="utf-8")
        draft.replace(self.path)

    def plain(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "columns": self.columns,
            "rows": self.rows,
            "notes": self.notes,
            "problems": self.problems,
        }


def cell(value: Value) -> str:
    """A figure in three digits; an absent one as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def lines(columns: Iterable[str], rows: Iterable[Iterable[Value]]) -> list[str]:
    """The table as text: words to the left, figures to the right."""
    cells = [list(columns), *([cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(not isinstance(v, str) for v in column) for column in zip(*rows, strict=True)]
    numeric = numeric or [False] * len(widths)
    return [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    ]


def page_of(results: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown for the results of one device."""
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items() if v)
    told = [
        f"**{results['device']}**: driver {results['driver']}, {versions}; "
        f"commit {results['commit']}, {results['date']}.",
        "",
        f"`{results['command']}`",
    ]
    for name, case in results["cases"].items():
        told += ["", f"`{name}`: {case['state']}."]
        if case.get("rows"):
            lengths = "| --- " * len(case["columns"])
            told += ["", f"| {' | '.join(case['columns'])} |", f"{lengths}|"]
            told += [f"| {' | '.join(map(cell, row))} |" for row in case["rows"]]
        told += [
            line for words in (*case.get("notes", ()), *case["problems"]) for line in ("", words)
        ]
    return told
