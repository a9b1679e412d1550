"""Describes errors of the operating system in a user's words."""

from __future__ import annotations

import errno
import os

from meshwright.errors import MachineError, Problem

_SAID = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the quota of disk space used up",
    errno.EROFS: "a read-only file system",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EFBIG: "a file larger than this process may write",
    errno.ENAMETOOLONG: "a name that is too long",
    errno.ENOTDIR: "a path through a file, as if it were a folder",
    errno.ELOOP: "symbolic links that lead in a circle",
    errno.EMFILE: "too many open files",
    errno.ENXIO: "a pipe that no process reads",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_MENDS = {
    errno.ENOSPC: "free some space, or choose a place on another disk",
    errno.EDQUOT: "free some space, or choose a place on another disk",
    errno.EROFS: "choose another place",
    errno.EACCES: "choose another place, or change who may use this one",
    errno.EPERM: "choose another place, or change who may use this one",
    errno.EFBIG: "raise the limit (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.ENOTDIR: "correct the path",
    errno.ELOOP: "mend the links",
    errno.EMFILE: "raise the limit (ulimit -n)",
}


def os_error_text(failure: OSError) -> str:
    """Returns what the system reported, in plain words."""
    return _SAID.get(failure.errno or 0) or failure.strerror or type(failure).__name__


def os_error_mend(failure: OSError) -> str:
    """Returns what helps against a failure; empty if that is not known."""
    return _MENDS.get(failure.errno or 0, "")


def machine_error(failure: OSError) -> MachineError:
    """Converts an unexpected OSError to a MachineError."""
    path = failure.filename or failure.filename2
    where = os.fsdecode(path) if isinstance(path, str | bytes) else "the operating system"
    if path is None and failure.errno in _FULL:  # failures on files are caught in `told`
        where = "standard output"
    wanted = "that the system allows it"
    return MachineError(Problem(where, "", os_error_text(failure), wanted, os_error_mend(failure)))
