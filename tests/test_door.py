"""The door through which files are read and written: what it lets through, what it refuses, and
that there is no other."""

from __future__ import annotations

import ast
import errno
import os
import resource
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshwright import files
from meshwright.errors import MeshwrightError, OutputError, PlanError
from meshwright.files import (
    add_line,
    append_file,
    check_folder,
    check_output,
    make_folder,
    read_bytes,
    read_lines,
    read_text,
    replacing,
    write_text,
)
from meshwright.os_errors import machine_error
from meshwright.text import printable
from sources import PACKAGE, files_below, tree_of


def refused(path: Path) -> str:
    """What is said of an input; within the time of the test, whatever stands there."""
    with pytest.raises(PlanError) as caught:
        read_text(path, error=PlanError, most=1000)
    (problem,) = caught.value.problems
    assert problem.source.startswith(printable(str(path))[:400])
    return str(caught.value)


def unwritable(path: Path, text: str = "text") -> str:
    """What is said of an output, of which nothing is left behind."""
    folder = path.parent
    before = sorted(folder.iterdir()) if folder.is_dir() else None
    with pytest.raises(OutputError) as caught:
        write_text(path, text)
    assert (sorted(folder.iterdir()) if folder.is_dir() else None) == before
    return str(caught.value)


def test_text_is_read_as_people_save_it(tmp_path: Path) -> None:
    path = tmp_path / "t"
    for data in (b"a\nb\n", b"a\r\nb\r\n", b"\xef\xbb\xbfa\nb\n", b"\xef\xbb\xbfa\r\nb\r\n"):
        path.write_bytes(data)
        assert read_text(path, error=PlanError) == "a\nb\n"
        assert list(read_lines(path, error=PlanError)) == [(1, "a"), (2, "b")]
    path.write_text("ä\u200c\U0001f600", encoding="utf-8")
    assert read_text(path, error=PlanError) == "ä\u200c\U0001f600"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"ab\ncd\xffe", "byte 0xff in line 2, at byte 3 of it, which is no UTF-8"),
        (b"\xff\xfea\0", "byte 0xff in line 1"),
        (b"a\n\0", "byte 0x00 in line 2, at byte 1 of it, which no text holds"),
        (b"x" * 1001, "1,001 bytes; wanted at most 1,000 bytes"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path: Path, data, words) -> None:
    path = tmp_path / "t"
    path.write_bytes(data)
    assert words in refused(path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    pipe, loop, inside = tmp_path / "pipe", tmp_path / "loop", tmp_path / "file" / "inside"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    inside.parent.write_text("a file")
    assert "found a pipe" in refused(pipe)
    assert "found a folder" in refused(tmp_path)
    assert "found a device" in refused(Path("/dev/zero"))
    assert "found a device" in refused(Path("/dev/null"))
    assert "circle" in refused(loop)
    assert "as if it were a folder" in refused(inside)
    assert "no such file" in refused(tmp_path / "none")
    assert "too long" in refused(tmp_path / ("n" * 5000))
    assert "a control character, U+000A" in refused(tmp_path / "a\nb")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        assert "found a socket" in refused(tmp_path / "socket")


def test_a_pipe_that_takes_the_place_of_a_file_is_noticed_when_it_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pipe = tmp_path / "t", tmp_path / "pipe"
    path.write_text("a file")
    os.mkfifo(pipe)
    genuine = os.open
    monkeypatch.setattr(os, "open", lambda _, flags, *rest: genuine(pipe, flags, *rest))
    assert "found a pipe" in refused(path)


def test_endless_files_are_not_read_to_their_end(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**40)
    assert f"{2**40:,} bytes" in refused(path)
    with pytest.raises(PlanError, match="at most"):
        list(read_lines(path, error=PlanError))
    path.write_bytes(b"short\n" + b"x" * (files.MOST_LINE_BYTES + 1))
    lines = read_lines(path, error=PlanError)
    assert next(lines) == (1, "short")
    with pytest.raises(PlanError, match=r"sparse:2: found an endless line"):
        next(lines)


def test_files_of_the_kernel_whose_size_is_unknown_are_bounded_too() -> None:
    path = Path("/proc/self/smaps")  # of size 0, and some thousand lines
    with pytest.raises(PlanError, match="more bytes than it had at first"):
        read_bytes(path, error=PlanError, most=100)


def spoiled(path: Path, failure: Exception) -> None:
    """A write that fails in its middle."""
    with replacing(path) as draft:
        draft.write_text("half of it")
        raise failure


def test_a_written_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "t"
    write_text(path, "first", durable=True)
    with pytest.raises(ZeroDivisionError):
        spoiled(path, ZeroDivisionError())
    with pytest.raises(OutputError, match="no space left on the disk"):
        spoiled(path, OSError(errno.ENOSPC, "told by the system"))
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_keeps_its_mode_and_its_links(tmp_path: Path) -> None:
    path, link, free = tmp_path / "t", tmp_path / "link", tmp_path / "free"
    before = os.umask(0o027)
    try:
        write_text(path, "1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(before)
    path.chmod(0o600)
    link.symlink_to(path)
    free.symlink_to(tmp_path / "later")
    write_text(link, "2")
    write_text(free, "3")
    assert link.is_symlink()
    assert path.read_text() == "2"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (tmp_path / "later").read_text() == "3"


def test_what_a_killed_process_left_of_a_file_is_taken_away(tmp_path: Path) -> None:
    path, other = tmp_path / "weights", tmp_path / "weights-2"
    for name in (path, other):
        with files.replacing(name) as draft:
            draft.write_text("half")
            os.link(draft, f"{draft}.draft")  # keeps it, as if no run had come to clean up
    path.write_text("whole")
    assert len([*tmp_path.glob(".weights*")]) == 2
    files.remove_drafts(path)
    assert [*tmp_path.glob(".weights.*")] == []
    assert len([*tmp_path.glob(".weights-2.*")]) == 1, "another file's is not touched"
    assert path.read_text() == "whole"


def test_outputs_that_are_no_files_are_refused(tmp_path: Path) -> None:
    loop, file, pipe = tmp_path / "loop", tmp_path / "file", tmp_path / "pipe"
    loop.symlink_to(loop)
    file.write_text("a file")
    os.mkfifo(pipe)
    assert "found a folder" in unwritable(tmp_path)
    assert "found a device" in unwritable(Path("/dev/zero"))
    assert "circle" in unwritable(loop)
    assert "as if it were a folder" in unwritable(file / "inside")
    assert "too long" in unwritable(tmp_path / ("n" * 300))
    assert "a pipe that no process reads" in unwritable(pipe)
    assert "half of a character" in unwritable(tmp_path / "t", "\ud800")
    for path in (tmp_path, Path("/dev/zero"), loop, file / "inside", tmp_path / ("n" * 300)):
        with pytest.raises(OutputError):
            check_output(path)
    for path in (file, loop, file / "inside"):
        with pytest.raises(OutputError):
            make_folder(path)
        with pytest.raises(OutputError):
            check_folder(path)
    check_output(tmp_path / "new" / "folder" / "t")
    check_folder(tmp_path / "new" / "folder")
    check_folder(tmp_path)
    assert not (tmp_path / "new").exists()


@pytest.mark.heavy
def test_what_a_shell_puts_in_the_place_of_a_file_is_poured_into(tmp_path: Path) -> None:
    write_text(Path("/dev/null"), "not kept")
    check_output(Path("/dev/null"))
    with pytest.raises(OutputError, match="a device"):
        check_output(Path("/dev/null"), kept=True)
    reader, writer = os.pipe()
    with os.fdopen(reader) as end:
        write_text(Path(f"/dev/fd/{writer}"), "poured")
        os.close(writer)
        assert end.read() == "poured"
    own = "from pathlib import Path; from meshwright.files import write_text as w; "
    own += "w(Path('/dev/stdout'), 'said')"
    done = subprocess.run([sys.executable, "-c", own], capture_output=True, text=True, check=True)
    assert done.stdout == "said"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", own], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "said"


def open_to_all(folder: Path) -> None:
    """Let everybody look into a folder, and into those above it that are ours."""
    for each in (folder, *folder.parents):
        if each == Path(tempfile.gettempdir()):
            return
        each.chmod(0o755)


def as_somebody(function) -> bool:
    """Run in a process without root's rights; whether it ended well."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.heavy
def test_what_permissions_forbid_is_said_before_and_when_it_is_done(tmp_path: Path) -> None:
    open_to_all(tmp_path)
    closed, own = tmp_path / "closed", tmp_path / "own"
    closed.mkdir()
    own.mkdir()
    (closed / "t").write_text("kept")
    (own / "t").write_text("secret")
    (own / "t").chmod(0o200)
    own.chmod(0o777)
    closed.chmod(0o555)

    def look() -> None:
        assert "no permission" in unwritable(closed / "new")
        assert "no permission" in unwritable(closed / "t")
        for check in (check_output, check_folder, make_folder):
            with pytest.raises(OutputError, match="no permission"):
                check(closed / "deep" / "er")
        assert "no permission" in refused(own / "t")

    assert as_somebody(look)
    assert (closed / "t").read_text() == "kept"


@pytest.mark.heavy
def test_a_full_disk_is_told_and_nothing_half_is_left(tmp_path: Path) -> None:
    """A limit on the size of files ends a write in its middle, as a full disk does."""

    def look() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        assert "larger than this process may write" in unwritable(tmp_path / "t", "x" * 10_000)
        with pytest.raises(OutputError, match="lines"), append_file(tmp_path / "lines") as lines:
            add_line(lines, "y" * 10_000)

    open_to_all(tmp_path)
    tmp_path.chmod(0o777)
    assert as_somebody(look)


def test_lines_are_added_to_a_regular_file_only(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with append_file(path) as lines:
        add_line(lines, "1")
    with append_file(path) as lines:
        add_line(lines, "2")
    assert path.read_text() == "1\n2\n"
    with append_file(path, anew=True) as lines:
        add_line(lines, "3")
    assert path.read_text() == "3\n"
    for other in (tmp_path, Path("/dev/zero")):
        with pytest.raises(OutputError), append_file(other):
            pass
    with append_file(path) as lines:
        path.unlink()
        with pytest.raises(OutputError, match="taken away meanwhile"):
            add_line(lines, "4")


def test_a_failure_that_nobody_foresaw_is_told_with_its_path() -> None:
    told = str(machine_error(FileNotFoundError(errno.ENOENT, "No such file or directory", "sh")))
    assert told.startswith("sh: found No such file or directory")
    assert "standard output: found no space left" in str(
        machine_error(OSError(errno.ENOSPC, "full"))
    )
    assert isinstance(machine_error(OSError()), MeshwrightError)


OPENERS = {
    "open", "fdopen", "read_text", "write_text", "read_bytes", "write_bytes", "copyfile", "copy2",
    "fromfile", "tofile", "memmap", "mkdir", "makedirs", "touch", "unlink", "is_file", "is_dir",
    "exists", "save_file", "iterdir", "glob",
}  # fmt: skip
"""Calls that reach into the file system."""
ELSEWHERE = {
    "cli.__init__": "the null device",
    "cluster.catalog": "the package's own table",
    "cluster.link_rates": "the package's own table",
    "cluster.host": "files of the kernel",
    "cost.profile": "files of the kernel",
    "runtime.worker": "safetensors writes into a draft of the door's",
    "testbed.capabilities": "files of the kernel",
    # Processes, their sockets, locks and logs have private folders of their own.
    "launch.root_cause": "how processes tell each other what failed",
    "launch.fork_server": "logs and pipes of processes",
    "launch.local": "logs and pipes of processes",
    "launch.lock": "locks",
    "launch.nodes": "a secret, for its owner alone",
    "runtime.corpus": "token files are read piece by piece",
    "runtime.failure": "how processes tell each other what failed",
    "runtime_folder": "a folder for its owner alone",
    "emulation.core_speed": "locks",
    "emulation.compute_lock": "locks",
    "testbed.lifecycle": "control groups",
    "testbed.cleanup": "control groups, and what stands on this machine",
}
"""Modules with calls of their own, and why."""


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute):
                # files.read_text, files.exists and so on are the door.
                if not (isinstance(called.value, ast.Name) and called.value.id == "files"):
                    yield called.attr
            elif isinstance(called, ast.Name):
                yield called.id


def test_there_is_no_other_door() -> None:
    found = {}
    for path in files_below(PACKAGE):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        used = sorted(OPENERS.intersection(calls(tree_of(path))))
        if used and name != "files":
            found[name] = used
    strangers = {name: used for name, used in found.items() if name not in ELSEWHERE}
    assert strangers == {}
    assert set(ELSEWHERE) <= set(found), "an exception that is needed no more"
