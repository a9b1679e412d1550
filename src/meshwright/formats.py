"""Reads JSON and TOML as plain data, strictly: what two readers could understand differently, and
what no file of ours can mean, is refused with its place.

Refused are duplicate keys, NaN and infinities, whole numbers of thousands of digits, dates, control
characters in text, and nesting or lists without end.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections import Counter
from datetime import date, time
from pathlib import Path
from typing import Any

from meshwright import files
from meshwright.errors import MeshwrightError, Problem
from meshwright.text import forbidden_character

MOST_TOML_BYTES = 8 * files.MEBI
"""Largest TOML file in bytes: TOML is for people, and is parsed slowly."""
MOST_DEPTH = 64
MOST_ENTRIES = 4_000_000
"""Largest number of commas, brackets and line ends of a file, which bounds the memory that its data
take."""
LARGE_FACTOR = 16
"""Factor by which a file that a run of ours has written may be larger than others."""
MOST_DIGITS = 1000
MISTAKES_TOLD = 100
"""Largest number of mistakes reported; the rest of the file is then skipped."""
_ENDLESS = re.compile(rf"(?<![0-9_])[0-9_]{{{MOST_DIGITS + 1},}}")
_WORD = "(?:[A-Za-z0-9_-]++|\"[^\"\n]*+\"|'[^'\n]*+')"
_DEEP_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{_WORD}[ \t]*+\.[ \t]*+){{{MOST_DEPTH}}}")
"""Dotted keys that nest too deep, `a.a.a...`: Python's TOML parser needs at least quadratic time
for them."""

KeyPath = tuple[int | str, ...]
"""Keys and indices that lead to a value: ("stages", 1, "layers")."""


class _Doubled(dict[str, Any]):
    """Marks a table in which a key occurs twice."""

    key: str


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) == len(pairs):
        return table
    doubled = _Doubled(table)
    doubled.key = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return doubled


def format_key_path(place: KeyPath) -> str:
    """Formats a place as a field: `("stages", 1, "layers")` becomes `stages[1].layers`."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read_table(path: Path, *, error: type[MeshwrightError], large: bool = False) -> dict[str, Any]:
    """Reads the table in a TOML file (by the suffix `.toml`) or a JSON file. Raises `error`, naming
    path and field, if the file is missing or malformed."""
    times, toml = LARGE_FACTOR if large else 1, path.suffix == ".toml"
    most = MOST_TOML_BYTES if toml else files.MOST_BYTES * times
    text = files.read_text(path, error=error, most=most)
    data = parse_text(text, toml=toml, source=str(path), error=error, most=MOST_ENTRIES * times)
    if not isinstance(data, dict):
        raise error(Problem(str(path), "", type(data).__name__, "a table of named fields"))
    return data


def parse_text(
    text: str,
    *,
    source: str,
    error: type[MeshwrightError],
    toml: bool = False,
    finite: bool = True,
    most: int = MOST_ENTRIES,
) -> Any:
    """Parses the data in a text of TOML or JSON; if not `finite`, NaN and infinities are allowed.
    Raises `error` with one Problem for every mistake."""
    _check_size(text, source, error, most)
    if toml and (deep := _DEEP_KEY.search(text)):
        raise error(_too_deep(source, (), text.count("\n", 0, deep.start()) + 1))
    found: list[Problem] = []
    try:
        data = tomllib.loads(text) if toml else json.loads(text, object_pairs_hook=_table)
        _look(data, (), source, finite, found)
    except RecursionError:
        raise error(_too_deep(source, ())) from None
    except ValueError as failure:  # both parsers raise it for malformed text
        wanted = f"well-formed {'TOML' if toml else 'JSON'}"
        raise error(Problem(source, "", f"{failure}", wanted)) from None
    error.check(found)
    return data


def _check_size(text: str, source: str, error: type[MeshwrightError], most: int) -> None:
    entries = sum(map(text.count, ",[{\n"))
    if entries > most:
        raise error(Problem(source, "", f"some {entries:,} entries", f"at most {most:,}"))
    if endless := _ENDLESS.search(text):
        line = text.count("\n", 0, endless.start()) + 1
        found = f"a number of {len(endless[0]):,} digits in line {line}"
        raise error(Problem(source, "", found, f"at most {MOST_DIGITS:,} digits"))


def _too_deep(source: str, place: KeyPath, line: int = 0) -> Problem:
    found = "tables or lists that are nested too deep" + (f", in line {line}" if line else "")
    return Problem(source, format_key_path(place[:3]), found, f"at most {MOST_DEPTH} levels")


def _look(value: object, place: KeyPath, source: str, finite: bool, found: list[Problem]) -> None:
    """Collects the problems of a value and of everything inside it."""
    if len(place) > MOST_DEPTH:
        found.append(_too_deep(source, place))
    elif isinstance(value, dict):
        if isinstance(value, _Doubled):
            twice = format_key_path((*place, value.key))
            found.append(Problem(source, twice, "a key that stands twice", "each key once"))
        for key, each in value.items():
            if wrong := forbidden_character(key):
                at = format_key_path((*place, key))
                found.append(Problem(source, at, f"a key with {wrong}", "printable text"))
            _look_inside(each, place, key, source, finite, found)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            _look_inside(each, place, index, source, finite, found)


def _look_inside(
    value: object, place: KeyPath, last: int | str, source: str, finite: bool, found: list[Problem]
) -> None:
    if len(found) >= MISTAKES_TOLD:
        return
    if isinstance(value, str):
        if wrong := forbidden_character(value, lines=True):
            at = format_key_path((*place, last))
            found.append(Problem(source, at, f"text with {wrong}", "printable text"))
    elif isinstance(value, float):
        if finite and not math.isfinite(value):
            found.append(
                Problem(source, format_key_path((*place, last)), str(value), "a finite number")
            )
    elif isinstance(value, dict | list):
        _look(value, (*place, last), source, finite, found)
    elif isinstance(value, date | time):
        at, wanted = format_key_path((*place, last)), "text in quotes, or a number"
        found.append(Problem(source, at, "a date or time", wanted))
