"""Failures of ranks: each says why in a file of the run folder; the launcher finds the cause."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meshwright import errors
from meshwright.errors import MeshwrightError, Problem, TrainingError
from meshwright.records import dumps, load
from meshwright.runtime.run import Failure, failure_file


@contextmanager
def rank_process(folder: Path) -> Iterator[None]:
    """The whole life of a rank: what goes wrong inside is written down, and the process ends.

    It ends at once, without taking the interpreter apart: gloo's threads may still hold tensors
    then, and abort a process whose work is done (pytorch/pytorch pull request 179291).
    """
    status = 1
    try:
        yield
        status = 0
    except Exception as error:
        _write_down(error, folder)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _write_down(error: Exception, folder: Path) -> None:
    rank = int(os.environ.get("RANK", "0"))
    failure = Failure(
        rank=rank,
        seconds=time.time(),
        kind=type(error).__name__,
        problems=_problems(error, rank),
        secondary=type(error).__name__ == "PeerLost",
    )
    failure_file(folder, rank).write_text(dumps(failure))


def _problems(error: Exception, rank: int) -> tuple[Problem, ...]:
    if isinstance(error, MeshwrightError):
        return error.problems
    frame = traceback.extract_tb(error.__traceback__)[-1]
    found = f"{type(error).__name__}: {error}"
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return (Problem(f"rank {rank}", where, found, "a run to the end"),)


def cause(folder: Path, status: int) -> MeshwrightError:
    """What a launcher's failure comes down to: the first rank that failed by itself, in its own
    words; else the process that vanished, and who noticed."""
    failures = sorted(_read(folder), key=lambda failure: failure.seconds)
    primary = [failure for failure in failures if not failure.secondary]
    logs = f"logs are in {folder}"
    if primary:
        kind = getattr(errors, primary[0].kind, TrainingError)
        return kind(*primary[0].problems)
    log = (folder / "launcher.log").read_text()
    wanted = "every rank alive to the end"
    lost = _first_lost(log)
    noticed = failures[0].problems[0] if failures else None
    # What has stopped is ended by torchrun, by SIGKILL: then the others know better.
    if lost is not None and not (noticed is not None and "Timed out" in noticed.found):
        rank, how = lost
        seen = "" if noticed is None else f"{noticed.source} {noticed.found}; "
        return TrainingError(Problem(f"rank {rank}", "", how, wanted, seen + logs))
    if failures:
        return TrainingError(*failures[0].problems)
    tail = " ".join(log.strip().splitlines()[-1:])
    return TrainingError(Problem("torchrun", "", f"exit status {status}: {tail}", wanted, logs))


def _read(folder: Path) -> list[Failure]:
    return [load(path, Failure, error=TrainingError) for path in folder.glob("failure-*.json")]


_ENDED = re.compile(r"rank\s*: (\d+).*?exitcode\s*: (-?\d+)", re.DOTALL)


def _first_lost(log: str) -> tuple[int, str] | None:
    """The process that could not speak for itself, and how it ended, from torchrun's summary.

    One that a signal ended comes before those that only noticed; torchrun itself ends the others
    by SIGTERM.
    """
    summary = log[log.rfind("FAILED") :]
    ended = [(int(rank), int(code)) for rank, code in _ENDED.findall(summary)]
    by_signal = [end for end in ended if end[1] < 0 and end[1] != -signal.SIGTERM]
    if not ended:
        return None
    rank, code = (by_signal or ended[-1:])[0]
    if code >= 0:
        return rank, f"a process that ended with status {code}"
    name = signal.Signals(-code).name
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return rank, f"a process that was ended by {name}{hint}"
