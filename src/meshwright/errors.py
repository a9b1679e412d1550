"""Everything that can go wrong because of an input, a machine or a run.

MeshwrightError            the family: catch this one
├── ClusterError           a cluster file, or what it describes, does not hold together
├── ModelError             a model cannot be read, traced or split
├── PlanError              a plan is malformed, contradicts itself, or is for something else
├── ProgramError           a program would deadlock, lose a message or repeat an action
├── ProfileError           measured times are missing, nonsense, or from elsewhere
├── DataError              training data cannot be read or are too short
├── FitError               nothing that fits in memory was found
├── LaunchError            processes cannot be started or cannot find each other
├── TrainingError          a run had to stop: NaN loss, a lost rank
├── OptionError            an option of the command line has a value that it cannot have
├── OutputError            a file or folder cannot be written
└── MachineError           the operating system refused something else
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from meshwright.text import SHOWN_LETTERS, SHOWN_OF_A_NAME, shown

PROBLEMS_SHOWN, PROBLEMS_KEPT = 100, 1000
"""A message that names more mistakes is read by nobody. A file can hold millions of them."""

_SHOWN = {
    "source": SHOWN_OF_A_NAME,
    "field": SHOWN_OF_A_NAME,
    "found": 4 * SHOWN_OF_A_NAME,
    "wanted": SHOWN_LETTERS,
    "mend": SHOWN_LETTERS,
}
"""Letters of each text of a Problem."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where it is, what was found, what was wanted, and what mends it."""

    source: str
    """File (or object) that holds the mistake."""
    field: str
    """Path of the field inside it, `pipelines[0].stages[1].layers`; empty for the whole."""
    found: str
    wanted: str
    mend: str = ""

    def __post_init__(self) -> None:
        # What is found comes from anywhere, and a message must not steer the terminal it is on.
        for name, most in _SHOWN.items():
            lines = name not in ("source", "field")
            object.__setattr__(self, name, shown(getattr(self, name), most, lines=lines))

    def __str__(self) -> str:
        where = f"{self.source}: {self.field}" if self.field else self.source
        mend = f"\n    {self.mend}" if self.mend else ""
        return f"{where}: found {self.found}; wanted {self.wanted}{mend}"


class MeshwrightError(Exception):
    """One or more problems that the user can mend; its text is all a user sees."""

    def __init__(self, *problems: Problem) -> None:
        lines = [str(problem) for problem in problems[:PROBLEMS_SHOWN]]
        if len(problems) > PROBLEMS_SHOWN:
            least = "at least " if len(problems) >= PROBLEMS_KEPT else ""
            lines.append(f"... and {least}{len(problems) - PROBLEMS_SHOWN:,} more mistakes")
        super().__init__("\n".join(lines))
        self.problems = problems

    @classmethod
    def check(cls, problems: Iterable[Problem]) -> None:
        """Raise all problems together, but no endless number; do nothing if there are none."""
        found = tuple(islice(problems, PROBLEMS_KEPT))
        if found:
            raise cls(*found)


class ClusterError(MeshwrightError):
    """A cluster file, or what it describes, does not hold together."""


class ModelError(MeshwrightError):
    """A model cannot be read, traced or split."""


class PlanError(MeshwrightError):
    """A plan is malformed, contradicts itself, or is for another model or cluster."""


class ProgramError(MeshwrightError):
    """A program would deadlock, lose a message or repeat an action."""


class ProfileError(MeshwrightError):
    """Measured times are missing, nonsense, or from another machine."""


class DataError(MeshwrightError):
    """Training data cannot be read or are too short."""


class FitError(MeshwrightError):
    """No plan fits into the memory of the devices."""


class LaunchError(MeshwrightError):
    """Processes cannot be started or cannot find each other."""


class TrainingError(MeshwrightError):
    """A run had to stop: a loss that is not a number, a lost rank."""


class OptionError(MeshwrightError):
    """An option of the command line has a value that it cannot have."""


class OutputError(MeshwrightError):
    """A file or folder cannot be written."""


class MachineError(MeshwrightError):
    """The operating system refused something that no other error is about."""
