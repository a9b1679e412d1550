"""Finds the root cause of a failed run: the failure that came first, by rank, in that rank's
words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from meshwright import errors
from meshwright.errors import LaunchError, MeshwrightError, Problem, TrainingError
from meshwright.launch.fork_server import ProcessEvent
from meshwright.launch.supervise import STORE, describe_exit, has_failed, signal_name
from meshwright.records import load, parse
from meshwright.runtime.run_folder import Failure

WANTED = "every rank alive to the end"
CLOCKS_DIFFER_SECONDS = 5.0
"""Largest difference between the clocks of two machines; older failure files belong to an earlier
run."""


def root_cause(events: Sequence[ProcessEvent], folder: Path, *, since: float) -> MeshwrightError:
    """Returns the error to report for a run that failed; `since` is when the run began.

    The cause is the earliest of two kinds of events: a rank reports its own failure, or a process
    vanishes. If there is no such event, the cause is a rank that was stopped (SIGSTOP); failing
    that, the report of a rank that noticed another one's absence.
    """
    words = [*_said(events), *_written(folder, since)]
    noticed = min((each for each in words if each.secondary), key=_when, default=None)
    said = {each.rank for each in words}
    vanished = [event for event in events if has_failed(event) and event.rank not in said]
    own = [each for each in words if not each.secondary]
    candidates: list[Failure | ProcessEvent] = [*own, *vanished]
    first = min(candidates, key=_when, default=None)
    if isinstance(first, Failure):
        return _in_own_words(first, folder)
    mend = f"{_seen(noticed)}logs are in {folder}"
    if first is not None:
        return _vanished(first, mend)
    stopped = _standing_still(events)
    if stopped is not None:
        found = f"a process that was stopped by {signal_name(-stopped.status)} and has not gone on"
        return TrainingError(Problem(_who(stopped.rank), "", found, WANTED, mend))
    problems = noticed.problems if noticed else (Problem("run", "", "no word", WANTED, mend),)
    return TrainingError(*problems)


def _when(each: Failure | ProcessEvent) -> float:
    return each.seconds


def _said(events: Iterable[ProcessEvent]) -> Iterator[Failure]:
    for event in events:
        if event.kind == "said":
            # A rank may have died while it wrote, or run a script that is not ours.
            with suppress(MeshwrightError, ValueError, RecursionError):
                yield parse(json.loads(event.said), Failure, source="rank", error=TrainingError)


def _written(folder: Path, since: float) -> Iterator[Failure]:
    """Yields the failures written by ranks of other machines that share the folder; a file that a
    full disk cut short is skipped."""
    for path in sorted(folder.glob("failure-*.json")):
        with suppress(MeshwrightError):
            failure = load(path, Failure, error=TrainingError)
            if failure.seconds > since - CLOCKS_DIFFER_SECONDS:
                yield failure


def _in_own_words(failure: Failure, folder: Path) -> MeshwrightError:
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, MeshwrightError):
        return kind(*failure.problems)
    logs = f"logs are in {folder}"
    return TrainingError(*(replace(p, mend=p.mend or logs) for p in failure.problems))


def _seen(noticed: Failure | None) -> str:
    if noticed is None:
        return ""
    problem = noticed.problems[0]
    return f"rank {noticed.rank} noticed: {problem.source} {problem.found}; "


def _vanished(event: ProcessEvent, mend: str) -> MeshwrightError:
    if event.kind == "refused":
        mend = "raise the limit on processes (ulimit -u), or the memory of this machine"
        return LaunchError(Problem(_who(event.rank), "", event.said, "to be started", mend))
    found = f"a process that {describe_exit(event.status)}"
    return TrainingError(Problem(_who(event.rank), "", found, WANTED, mend))


def _who(rank: int) -> str:
    return "the process that keeps the store" if rank == STORE else f"rank {rank}"


def _standing_still(events: Iterable[ProcessEvent]) -> ProcessEvent | None:
    """Returns the process that was stopped first and has not continued since."""
    stopped: dict[int, ProcessEvent] = {}
    for event in events:
        if event.kind == "stopped":
            stopped.setdefault(event.rank, event)
        elif event.kind != "said":
            stopped.pop(event.rank, None)
    return min(stopped.values(), key=lambda event: event.seconds, default=None)
