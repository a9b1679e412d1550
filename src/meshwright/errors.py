"""Defines the errors that an input, a machine or a run can cause.

MeshwrightError            the base class: catch this one
├── ClusterError           a cluster file, or what it describes, is contradictory
├── ModelError             a model cannot be read, traced or split
├── PlanError              a plan is malformed, contradicts itself, or is for something else
├── ProgramError           a program would deadlock, lose a message or repeat an action
├── ProfileError           measured times are missing, nonsense, or from elsewhere
├── DataError              training data cannot be read or are too short
├── FitError               no plan fits into the memory of the devices
├── MoneyError             hourly prices are missing, nonsense, or in another currency
├── LimitError             no plan meets the limits on cost or time
├── LaunchError            processes cannot be started or cannot find each other
├── TrainingError          a run had to stop: NaN loss, a lost rank
├── OptionError            an option of the command line has an invalid value
├── OutputError            a file or folder cannot be written
└── MachineError           the operating system refused another operation
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from meshwright.text import SHOWN_LETTERS, SHOWN_OF_A_NAME, name_ranges, shown

PROBLEMS_SHOWN, PROBLEMS_KEPT = 100, 1000
"""Largest number of problems that a message prints, and that an error keeps: a file can hold
millions of mistakes."""

_SHOWN = {
    "source": SHOWN_OF_A_NAME,
    "field": SHOWN_OF_A_NAME,
    "found": 4 * SHOWN_OF_A_NAME,
    "wanted": SHOWN_LETTERS,
    "mend": SHOWN_LETTERS,
}
"""Longest text of each field of a Problem, in characters."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Describes one mistake: where it is, what was found, what was wanted, and how to mend it."""

    source: str
    """File or object that contains the mistake."""
    field: str
    """Path of the field inside it, like `pipelines[0].stages[1].layers`; empty for the whole
    file."""
    found: str
    wanted: str
    mend: str = ""
    each: tuple[str, str] = ("", "")
    """Kind and name of the thing at fault, if others of its kind may have the same mistake:
    `("device", "a:0")`. Problems that differ only in that name, and in the indices of their fields,
    are reported as one. Empty if the problem stands alone."""

    def __post_init__(self) -> None:
        # Text of a problem may come from any file, and must not control the terminal.
        for name, most in _SHOWN.items():
            lines = name not in ("source", "field")
            object.__setattr__(self, name, shown(getattr(self, name), most, lines=lines))

    def __str__(self) -> str:
        where = f"{self.source}: {self.field}" if self.field else self.source
        mend = f"\n    {self.mend}" if self.mend else ""
        return f"{where}: found {self.found}; wanted {self.wanted}{mend}"


class MeshwrightError(Exception):
    """Tells the user of one or more problems that they can mend; they see only this text, no
    traceback."""

    def __init__(self, *problems: Problem) -> None:
        problems = merge_problems(problems)
        lines = [str(problem) for problem in problems[:PROBLEMS_SHOWN]]
        if len(problems) > PROBLEMS_SHOWN:
            least = "at least " if len(problems) >= PROBLEMS_KEPT else ""
            lines.append(f"... and {least}{len(problems) - PROBLEMS_SHOWN:,} more mistakes")
        super().__init__("\n".join(lines))
        self.problems = problems

    @classmethod
    def check(cls, problems: Iterable[Problem]) -> None:
        """Raises all problems together, at most PROBLEMS_KEPT of them; does nothing if there are
        none."""
        found = merge_problems(problems)
        if found:
            raise cls(*found)


class ClusterError(MeshwrightError):
    """Is raised when a cluster file, or what it describes, contradicts itself."""


class ModelError(MeshwrightError):
    """Is raised when a model cannot be read, traced or split."""


class PlanError(MeshwrightError):
    """Is raised when a plan is malformed, contradicts itself, or is for another model or
    cluster."""


class ProgramError(MeshwrightError):
    """Is raised when a program would deadlock, lose a message or repeat an action."""


class ProfileError(MeshwrightError):
    """Is raised when measured times are missing, nonsense, or from another machine."""


class DataError(MeshwrightError):
    """Is raised when training data cannot be read or are too short."""


class FitError(MeshwrightError):
    """Is raised when no plan fits into the memory of the devices."""


class MoneyError(MeshwrightError):
    """Is raised when hourly prices are missing, nonsense, or in another currency."""


class LimitError(MeshwrightError):
    """Is raised when no plan meets the user's limits on cost or time."""


class LaunchError(MeshwrightError):
    """Is raised when processes cannot be started or cannot find each other."""


class TrainingError(MeshwrightError):
    """Is raised when a run must stop: its loss is not a finite number, or a rank is lost."""


class OptionError(MeshwrightError):
    """Is raised when an option of the command line has an invalid value."""


class OutputError(MeshwrightError):
    """Is raised when a file or folder cannot be written."""


class MachineError(MeshwrightError):
    """Is raised when the operating system refuses an operation that no other error covers."""


_INDEX = re.compile(r"\[(\d+)\]")


def merge_problems(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Merges problems that are the same mistake of several things, each at the place of its first
    one; returns at most PROBLEMS_KEPT."""
    alike: dict[object, list[Problem]] = {}
    for problem in problems:
        key = _mistake(problem) if problem.each[0] else len(alike)
        alike.setdefault(key, []).append(problem)
        if len(alike) == PROBLEMS_KEPT:
            break
    return tuple(_as_one(same) if len(same) > 1 else same[0] for same in alike.values())


def _mistake(problem: Problem) -> object:
    """Returns a key that is equal for two problems if they are the same mistake of two things."""
    kind, name = problem.each
    texts = (_put(text, name, "\0") for text in (problem.found, problem.wanted, problem.mend))
    field = _INDEX.sub("[]", _put(problem.field, name, "\0"))
    return (kind, _put(problem.source, name, "\0"), field, *texts)


def _put(text: str, name: str, other: str) -> str:
    """Replaces a name in a text by another word, but not within a longer name."""
    if not name or name not in text:
        return text
    first, *rest = text.split(name)
    for piece in rest:
        inside = _continues(first[-1:], "_:.-") or _continues(piece[:1], "_:-")
        first += (name if inside else other) + piece
    return first


def _continues(letter: str, signs: str) -> bool:
    return letter.isalnum() or (letter != "" and letter in signs)


def _as_one(same: Sequence[Problem]) -> Problem:
    first = same[0]
    kind, name = first.each
    names = list(dict.fromkeys(problem.each[1] for problem in same))
    many = f"{len(names):,} {kind}s ({name_ranges(names)})" if len(names) > 1 else name
    found = _put(first.found, name, many)
    fields = list(dict.fromkeys(_put(p.field, p.each[1], many) for p in same))
    return replace(
        first,
        source=_put(first.source, name, many),
        field=_fields(fields),
        found=found,
        wanted=_put(first.wanted, name, many),
        mend=_put(first.mend, name, many),
        each=("", ""),
    )


def _fields(fields: Sequence[str]) -> str:
    """Shortens fields that differ in their indices: `pipelines[0-63].stages[0]`. If they are not
    every combination of these indices, gives a range of the first index for each of the others."""
    indices = {field: _INDEX.findall(field) for field in fields}
    combinations = prod(len(set(column)) for column in zip(*indices.values(), strict=True))
    groups: dict[object, list[list[str]]] = {}
    for found in indices.values():
        groups.setdefault(None if combinations == len(fields) else tuple(found[1:]), []).append(
            found
        )
    return ", ".join(_field(fields[0], group) for group in groups.values())


def _field(like: str, indices: Sequence[Sequence[str]]) -> str:
    """Returns one field name with a range in the place of each index."""
    texts = iter([name_ranges(column, to="-") for column in zip(*indices, strict=True)])
    return _INDEX.sub(lambda _: f"[{next(texts)}]", like)
