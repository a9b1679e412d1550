"""Lets the emulated devices of one machine compute in turns, one at a time for every two cores.

If they computed at once they would compete for caches and cores, which slows them by up to one
half; stretched by 1 / share, that would be most of the difference between two runs. Each device
computes for a small part of the time that it is busy, so waiting for its turn only shortens its
sleep. The other half of the cores is left to messages.
"""

from __future__ import annotations

import fcntl
import os
from functools import cache
from pathlib import Path

from meshwright.runtime_folder import runtime_folder


def devices_at_once(cores: int) -> int:
    """Returns the number of emulated devices that may compute at the same time."""
    return max(1, cores // 2)


def turns_folder() -> Path:
    """Returns the folder of locks that this machine's emulated devices share, creating it if
    necessary. Raises LaunchError, see `runtime_folder`."""
    folder = runtime_folder() / "turns"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class ComputeLock:
    """Gives this process the right to compute: a file lock, which the system releases when the
    process ends.

    `folder` and `at_once` must be the same for all processes that take turns, by default all of a
    user's.
    """

    def __init__(self, folder: Path | None = None, at_once: int | None = None) -> None:
        at_once = at_once or devices_at_once(os.cpu_count() or 1)
        self._files = _files(folder or turns_folder(), at_once)
        self._held: int | None = None

    @property
    def held(self) -> bool:
        """True if this process holds a lock, and so may compute."""
        return self._held is not None

    def acquire(self) -> None:
        """Waits until this process holds a lock."""
        if self._held is None:
            self._held = next(filter(_free, self._files), None) or self._wait()

    def _wait(self) -> int:
        """Waits for one of the locks."""
        file = self._files[os.getpid() % len(self._files)]
        fcntl.lockf(file, fcntl.LOCK_EX)
        return file

    def release(self) -> None:
        """Releases the lock."""
        if self._held is not None:
            fcntl.lockf(self._held, fcntl.LOCK_UN)
            self._held = None


def _free(file: int) -> bool:
    """Tries to take a lock; returns False if another process holds it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@cache
def _files(folder: Path, at_once: int) -> tuple[int, ...]:
    return tuple(os.open(folder / str(n), os.O_CREAT | os.O_RDWR, 0o600) for n in range(at_once))
