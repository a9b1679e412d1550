"""Emulated devices of one machine compute in turns, one at a time for every two cores.

Computing at once they would take each other's caches and cores, now and then, which slows them by
up to one half and, stretched by 1 / share, is most of what one run differs from the next. As each
computes for a small part of the time that it is busy, waiting for a turn only shortens the sleep.
The other half of the cores is left to messages.
"""

from __future__ import annotations

import fcntl
import os
from functools import cache
from pathlib import Path

from meshwright.runtime_folder import runtime_folder


def turns_at_once(cores: int) -> int:
    """How many emulated devices compute at a time on a machine with so many cores."""
    return max(1, cores // 2)


def turns_folder() -> Path:
    """What emulated devices share on this machine; made if there is none. Raises LaunchError, see
    `runtime_folder`."""
    folder = runtime_folder() / "turns"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class Turn:
    """This process's right to compute, by a lock that the system lifts when a process ends.

    `folder` and `at_once` are the same for all who take turns: by default all of a user's.
    """

    def __init__(self, folder: Path | None = None, at_once: int | None = None) -> None:
        at_once = at_once or turns_at_once(os.cpu_count() or 1)
        self._files = _files(folder or turns_folder(), at_once)
        self._held: int | None = None

    @property
    def mine(self) -> bool:
        """Whether this process may compute."""
        return self._held is not None

    def take(self) -> None:
        """Waits until it may."""
        if self._held is None:
            self._held = next(filter(_free, self._files), None) or self._wait()

    def _wait(self) -> int:
        file = self._files[os.getpid() % len(self._files)]
        fcntl.lockf(file, fcntl.LOCK_EX)
        return file

    def leave(self) -> None:
        """Lets another one compute."""
        if self._held is not None:
            fcntl.lockf(self._held, fcntl.LOCK_UN)
            self._held = None


def _free(file: int) -> bool:
    """Whether it was nobody's; then it is this process's."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@cache
def _files(folder: Path, at_once: int) -> tuple[int, ...]:
    return tuple(os.open(folder / str(n), os.O_CREAT | os.O_RDWR, 0o600) for n in range(at_once))
