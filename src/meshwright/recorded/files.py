"""Reads runs files: comma-separated values, one run in a row, columns as in RecordedRun."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from io import StringIO
from pathlib import Path
from typing import Any

from meshwright import files
from meshwright.errors import Problem, ProfileError
from meshwright.recorded.spec import RecordedRun
from meshwright.recorded.validate import run_problems
from meshwright.records import parse
from meshwright.text import did_you_mean

COLUMNS = tuple(each.name for each in fields(RecordedRun))
REQUIRED = tuple(each.name for each in fields(RecordedRun) if each.default is MISSING)
NUMBERS = frozenset(
    (
        *("layers", "width", "heads", "kv_heads", "hidden", "vocabulary", "sequence"),
        *("devices", "devices_per_node", "data", "tensor", "stages", "chunks"),
        *("rows", "global_batch"),
    )
)
"""Columns of whole numbers."""
ANSWERS = {"yes": True, "no": False}
"""Cells of the columns `tied` and `compiled`."""
MOST_RUNS = 10_000


def read_runs(path: Path) -> tuple[RecordedRun, ...]:
    """Reads and checks a runs file. Raises ProfileError with every mistake found; a mistake names
    the file, the line and the column."""
    return tuple(run for _, run in placed_runs(path))


def placed_runs(path: Path) -> tuple[tuple[str, RecordedRun], ...]:
    """Reads and checks a runs file as `read_runs` does, and returns the place of every run with it,
    as `file:line`."""
    rows = list(_rows(path))
    runs: list[tuple[str, RecordedRun]] = []
    problems: list[Problem] = []
    for place, cells in rows:
        try:
            run = _run(cells, place)
        except ProfileError as failure:
            problems += failure.problems
            continue
        runs.append((place, run))
        problems += run_problems(run, place)
    names = Counter(cells.get("run", "") for _, cells in rows)
    for place, cells in rows:
        if names[cells.get("run", "")] > 1:
            problems.append(Problem(place, "run", cells.get("run", ""), "a name of its own"))
    ProfileError.check(problems)
    return tuple(runs)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the place of every row, as `file:line`, with its cells that are not empty."""
    text = files.read_text(path, error=ProfileError).removeprefix("\ufeff")
    lines = csv.reader(StringIO(text), strict=True)
    try:
        header = [name.strip() for name in next(lines, [])]
        ProfileError.check(_header_problems(header, str(path)))
        count = 0
        for cells in lines:
            place = f"{path}:{lines.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            count += 1
            if count > MOST_RUNS:
                raise ProfileError(Problem(place, "", "more runs", f"at most {MOST_RUNS:,}"))
            if len(cells) != len(header):
                found, wanted = f"{len(cells)} cells", f"{len(header)}, as in the first line"
                raise ProfileError(Problem(place, "", found, wanted, "quote a cell with commas"))
            pairs = zip(header, map(str.strip, cells), strict=True)
            yield place, {name: cell for name, cell in pairs if cell}
    except csv.Error as failure:
        place = f"{path}:{lines.line_num}"
        raise ProfileError(Problem(place, "", str(failure), "comma-separated values")) from None
    if not count:
        raise ProfileError(Problem(str(path), "", "no run", "a row for each run"))


def _header_problems(header: list[str], source: str) -> Iterator[Problem]:
    place = f"{source}:1"
    for name in header:
        if name not in COLUMNS:
            wanted = f"one of: {', '.join(COLUMNS)}"
            yield Problem(place, name, "an unknown column", wanted, did_you_mean(name, COLUMNS))
    for name, number in Counter(header).items():
        if number > 1:
            yield Problem(place, name, f"{number} columns", "one column of each name")
    for name in REQUIRED:
        if name not in header:
            yield Problem(place, name, "nothing", "this column, which is required")


def _run(cells: Mapping[str, str], place: str) -> RecordedRun:
    data: dict[str, Any] = dict(cells)
    for name, cell in cells.items():
        if name in NUMBERS and re.fullmatch("[0-9]{1,18}", cell):
            data[name] = int(cell)
        elif name in ("tied", "compiled"):
            if cell not in ANSWERS:
                raise ProfileError(Problem(place, name, repr(cell), "yes or no"))
            data[name] = ANSWERS[cell]
    return parse(data, RecordedRun, source=place, error=ProfileError)


def runs_text(runs: Iterable[RecordedRun]) -> str:
    """Formats runs as a runs file that `read_runs` reads back."""
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        writer.writerow([_cell(name, getattr(run, name)) for name in COLUMNS])
    return out.getvalue()


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{8 * value / 1e9!r} Gbit/s" if name == "network" else f"{value!r} s"
    return f"{value} B" if name == "memory" else str(value)
