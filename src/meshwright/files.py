"""Reads and writes all files of a user.

Only regular files of a limited size are read: a pipe would wait for ever and /dev/zero has no end,
so everything else is refused by name. A file is written completely or not at all: the text goes
into a draft next to it, which replaces the file when it is complete. Errors name the path, what the
system reported, and what mends it.
"""

from __future__ import annotations

import codecs
import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal, TextIO

from meshwright.errors import MeshwrightError, OutputError, Problem
from meshwright.os_errors import os_error_mend, os_error_text
from meshwright.text import forbidden_character

MEBI = 2**20
MOST_BYTES = 64 * MEBI
"""Largest size in bytes of a file that is read as a whole."""
MOST_LINE_BYTES = MEBI
"""Largest size in bytes of a line of a file that is read line by line."""
MOST_LINES_BYTES = 4096 * MEBI
"""Largest size in bytes of a file that is read line by line."""

_CHUNK = MEBI
_UNWAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_CLOEXEC", 0)
_NULL_DEVICE = (1, 3)
"""Major and minor device number of /dev/null on Linux, to which output may be discarded."""
_DRAFT_SUFFIX = ".draft"
_MOST_NAME_BYTES = 200
"""Longest file name that is repeated in the name of its draft; file systems limit both alike."""

_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def is_file(path: Path) -> bool:
    """True if the path is a regular file, as far as this process can see."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """True if the path is a folder, as far as this process can see."""
    return stat.S_ISDIR(_mode(path))


def exists(path: Path) -> bool:
    """True if the path exists, as far as this process can see."""
    return _mode(path) != 0


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):
        return 0


def _kind(mode: int) -> str:
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "nothing")


def _unnameable(path: Path) -> str:
    """Returns why a path cannot be printed or stored in a file; empty if it can."""
    wrong = forbidden_character(str(path))
    return f"a path with {wrong}" if wrong else ""


@contextmanager
def _reading(path: Path, error: type[MeshwrightError], most: int) -> Iterator[BinaryIO]:
    """Opens a regular file. An OSError inside the block is also raised as `error`."""
    if wrong := _unnameable(path):
        raise error(Problem(str(path), "", wrong, "a name of letters", "rename it"))
    try:
        _check_regular(path, os.stat(path), error, most)
        with os.fdopen(os.open(path, os.O_RDONLY | _UNWAITING), "rb") as file:
            # Checked again: another file may have replaced it.
            _check_regular(path, os.fstat(file.fileno()), error, most)
            yield file
    except FileNotFoundError:
        raise error(Problem(str(path), "", "no such file", "a readable file")) from None
    except OSError as failure:
        mend = os_error_mend(failure)
        wanted = "a readable text file"
        raise error(Problem(str(path), "", os_error_text(failure), wanted, mend)) from None


def _check_regular(
    path: Path, found: os.stat_result, error: type[MeshwrightError], most: int
) -> None:
    if not stat.S_ISREG(found.st_mode):
        wanted = "a regular file, a readable text file"
        raise error(Problem(str(path), "", _kind(found.st_mode), wanted))
    if found.st_size > most:
        raise _too_large(path, error, most, f"{found.st_size:,} bytes")


def _too_large(path: Path, error: type[MeshwrightError], most: int, found: str) -> MeshwrightError:
    return error(Problem(str(path), "", found, f"at most {most:,} bytes"))


def check_input(path: Path, *, error: type[MeshwrightError]) -> None:
    """Raises `error` unless there is a regular file that this process may read, of any size."""
    with _reading(path, error, sys.maxsize):
        pass


def read_bytes(path: Path, *, error: type[MeshwrightError], most: int = MOST_BYTES) -> bytes:
    """Returns the bytes of a file. Raises `error`, naming the path, for whatever prevents that."""
    with _reading(path, error, most) as file:
        chunks: list[bytes] = []
        size = 0
        while chunk := file.read(_CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > most:
                raise _too_large(path, error, most, "more bytes than it had at first")
        return b"".join(chunks)


def read_text(path: Path, *, error: type[MeshwrightError], most: int = MOST_BYTES) -> str:
    """Returns the text of a UTF-8 file without byte order mark and with Unix line ends. Raises
    `error`, naming path and position, for bytes that are not UTF-8."""
    data = read_bytes(path, error=error, most=most).removeprefix(codecs.BOM_UTF8)
    return _decoded(data, path, error).replace("\r\n", "\n")


def read_lines(path: Path, *, error: type[MeshwrightError]) -> Iterator[tuple[int, str]]:
    """Yields number and text of every line of a UTF-8 file that may be larger than memory. Raises
    `error`."""
    with _reading(path, error, MOST_LINES_BYTES) as file:
        number = 0
        while line := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > MOST_LINE_BYTES:
                found, wanted = "an endless line", f"at most {MOST_LINE_BYTES:,} bytes in a line"
                raise error(Problem(f"{path}:{number}", "", found, wanted))
            own = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield number, _decoded(own, path, error, line=number).rstrip("\r\n")


def _decoded(data: bytes, path: Path, error: type[MeshwrightError], *, line: int = 1) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as failure:
        byte, place = f"byte 0x{data[failure.start]:02x}", failure.start
        reason, mend = "which is no UTF-8", "save it as UTF-8 text"
    else:
        if "\0" not in text:
            return text
        byte, place = "byte 0x00", data.index(0)
        reason, mend = "which no text holds", ""
    number = line + data.count(b"\n", 0, place)
    column = place - data.rfind(b"\n", 0, place)
    found = f"{byte} in line {number}, at byte {column} of it, {reason}"
    raise error(Problem(str(path), "", found, "a readable text file", mend)) from None


@contextmanager
def as_output_errors(path: Path) -> Iterator[None]:
    """Raises an OSError inside the block as an OutputError about `path`."""
    if wrong := _unnameable(path):
        raise OutputError(Problem(str(path), "", wrong, "a name of letters"))
    try:
        yield
    except OSError as failure:
        mend = os_error_mend(failure)
        wanted = "a place that can be written to"
        raise OutputError(Problem(str(path), "", os_error_text(failure), wanted, mend)) from None


def _is_stream(path: Path) -> bool:
    """True if a path is a pipe of a shell's `>(...)`, this process's own output, or /dev/null:
    bytes are then written straight to it."""
    mode = _mode(path)
    if stat.S_ISFIFO(mode):
        return True
    if not stat.S_ISCHR(mode):
        return False
    found = os.stat(path)
    if (os.major(found.st_rdev), os.minor(found.st_rdev)) == _NULL_DEVICE:
        return True
    own = []
    for descriptor in (1, 2):
        with suppress(OSError):
            own.append(os.fstat(descriptor))
    return any((each.st_dev, each.st_ino) == (found.st_dev, found.st_ino) for each in own)


def _destination(path: Path) -> Path:
    """Returns the regular file, existing or new, that a path leads to. Raises OutputError,
    OSError."""
    real = Path(os.path.realpath(path))
    try:
        found = os.stat(real)
    except FileNotFoundError:
        return real
    if not stat.S_ISREG(found.st_mode):
        wanted = "a regular file, or a name that is free"
        raise OutputError(Problem(str(path), "", _kind(found.st_mode), wanted))
    if not os.access(real, os.W_OK):
        raise PermissionError(errno.EACCES, "")
    return real


def _check_folder_of(path: Path, folder: Path) -> None:
    """Raises OutputError or OSError unless a folder is writable or can be created."""
    while not exists(folder) and folder != folder.parent:
        folder = folder.parent
    if not is_folder(folder):
        found = f"{folder}, which is {_kind(_mode(folder))}"
        raise OutputError(Problem(str(path), "", found, "a folder that can be made or written to"))
    if not os.access(folder, os.W_OK | os.X_OK):
        readonly = os.statvfs(folder).f_flag & os.ST_RDONLY
        raise OSError(errno.EROFS if readonly else errno.EACCES, "")


def check_output(path: Path, *, kept: bool = False) -> None:
    """Raises OutputError, before long work, if its result could not be written to a path. If
    `kept`, the result will be read again, so the path must be a file."""
    with as_output_errors(path):
        if kept or not _is_stream(path):
            real = _destination(path)
            _check_folder_of(path, real.parent)


def check_folder(path: Path) -> None:
    """Raises OutputError, before long work, if a folder could not be created or written to."""
    with as_output_errors(path):
        with suppress(FileNotFoundError):
            os.stat(path)  # raises for circular links and for names that are too long
        _check_folder_of(path, Path(os.path.realpath(path)))


def make_folder(path: Path) -> None:
    """Creates a folder and the folders above it. Raises OutputError."""
    with as_output_errors(path):
        if exists(path) and not is_folder(path):
            raise OutputError(Problem(str(path), "", _kind(_mode(path)), "a folder"))
        path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Deletes a file if it exists. Raises OutputError."""
    with as_output_errors(path):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Writes a whole file as UTF-8, and creates the folders above it. If `durable`, the file also
    survives a loss of power. Raises OutputError."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as failure:
        found = f"text with half of a character, U+{ord(text[failure.start]):04X}"
        raise OutputError(Problem(str(path), "", found, "text that UTF-8 can hold")) from None
    if _is_stream(path):
        with as_output_errors(path):
            _pour(path, data)
        return
    with replacing(path, durable=durable) as draft:
        draft.write_bytes(data)


def _pour(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | _UNWAITING)
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a draft next to `path` to be written in the block. It replaces the file if the block
    succeeds, and is deleted if not. Raises OutputError, also for an OSError of the block."""
    with as_output_errors(path):
        real = _destination(path)
        _check_folder_of(path, real.parent)
        real.parent.mkdir(parents=True, exist_ok=True)
        draft = real.parent / f"{_draft_prefix(real)}{os.urandom(6).hex()}{_DRAFT_SUFFIX}"
        mode = stat.S_IMODE(_mode(real)) if exists(real) else None
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _UNWAITING, 0o666))
        try:
            if mode is not None:
                draft.chmod(mode)
            yield draft
            if durable:
                _settle(draft)
            os.replace(draft, real)
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)


def remove_drafts(path: Path) -> None:
    """Deletes the drafts of `path` that killed processes have left; no process may be writing
    it."""
    with as_output_errors(path):
        real = _destination(path)
        for entry in os.scandir(real.parent):
            if entry.name.startswith(_draft_prefix(real)) and entry.name.endswith(_DRAFT_SUFFIX):
                os.unlink(entry.path)


def _draft_prefix(path: Path) -> str:
    short = len(os.fsencode(path.name)) <= _MOST_NAME_BYTES
    return f".{path.name if short else 'meshwright'}."


def _settle(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | _UNWAITING)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy(source: Path, target: Path, *, error: type[MeshwrightError]) -> None:
    """Copies a small file. Raises `error` for the source, OutputError for the target."""
    data = read_bytes(source, error=error)
    with replacing(target) as draft:
        draft.write_bytes(data)


@contextmanager
def append_file(path: Path, *, anew: bool = False) -> Iterator[TextIO]:
    """Opens a file for `add_line`; if `anew`, without the lines that it has. Raises OutputError."""
    with as_output_errors(path):
        real = _destination(path)
        mode: Literal["w", "a"] = "w" if anew else "a"
        file = open(real, mode, 1, encoding="utf-8", opener=_open_unwaiting)  # noqa: SIM115
    try:
        yield file
    finally:
        with suppress(
            OSError
        ):  # for a line that could not be written, which `add_line` has reported
            file.close()


def _open_unwaiting(path: str, flags: int) -> int:
    return os.open(path, flags | _UNWAITING, 0o666)


def add_line(file: TextIO, line: str) -> None:
    """Adds one line to a growing file. Raises OutputError, also if the file was deleted in the
    meantime, since the line would then be lost."""
    path = Path(file.name)
    with as_output_errors(path):
        file.write(f"{line}\n")
        if os.fstat(file.fileno()).st_nlink == 0:
            found, wanted = "a file that was taken away meanwhile", "it to stay to the end"
            raise OutputError(Problem(str(path), "", found, wanted))
