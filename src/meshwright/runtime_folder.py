"""Finds the folder in which one user's processes on this machine leave messages for each other.

Its content decides which processes are ended and which may compute, so no other user may have
created it or be able to write to it. Owner and mode are checked each time, and symbolic links are
refused.
"""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from meshwright.errors import LaunchError, Problem


def runtime_folder(places: Iterable[Path] | None = None) -> Path:
    """Returns the first of these places that belongs to this user alone; it is created if it is
    missing.

    By default: /run/meshwright for root, then `$XDG_RUNTIME_DIR/meshwright`, then a folder named
    after the user next to other temporary files, then one in the user's cache. Raises LaunchError,
    with what is wrong about each place, if none can be used.
    """
    wrong: list[str] = []
    for place in _places() if places is None else places:
        reason = _refused(place)
        if not reason:
            return place
        wrong.append(f"{place} {reason}")
    raise LaunchError(
        Problem(
            "runtime folder",
            "",
            "; ".join(wrong),
            "one that this user owns and no other user can write to",
            "set XDG_RUNTIME_DIR to such a folder",
        )
    )


def _places() -> Iterator[Path]:
    user = os.geteuid()
    if user == 0:
        yield Path("/run/meshwright")
    if os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(os.environ["XDG_RUNTIME_DIR"]) / "meshwright"
    yield Path(tempfile.gettempdir()) / f"meshwright-{user}"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    # Several machines may share a home directory.
    yield Path(cache) / "meshwright" / socket.gethostname()


def _refused(place: Path) -> str:
    """Returns why a folder cannot be trusted; empty if it can. A missing folder is created."""
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
    except OSError as failure:
        return f"cannot be made: {failure.strerror}"
    if not stat.S_ISDIR(found.st_mode):
        return "is no folder"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}"
    if found.st_mode & 0o077:
        return f"is open to others (mode {stat.S_IMODE(found.st_mode):o})"
    return ""
