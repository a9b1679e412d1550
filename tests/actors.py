"""What processes under test do: main() of this module plays the part that its argument names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Play a part: `exits 3`, `killed 9`, `says words`, `waits FILE`, `refuses FILE`, ..."""
    part, *arguments = sys.argv[1:]
    PARTS[part](*arguments)


def exits(status: str) -> None:
    """Ends with a status."""
    sys.exit(int(status))


def fails() -> None:
    """Ends by an exception."""
    raise ValueError("this failed")


def killed(number: str) -> None:
    """Ends by a signal."""
    os.kill(os.getpid(), int(number))
    signal.pause()


def says(*words: str) -> None:
    """Tells its launcher each word, and prints it."""
    from meshwright.runtime.failure import report_line

    for word in words:
        print(word, flush=True)
        assert report_line(word)


def waits(folder: str) -> None:
    """Writes down its process id, and waits to be ended."""
    mark(folder)
    while True:
        signal.pause()


def stops(folder: str) -> None:
    """Writes down its process id, and stands still."""
    mark(folder)
    os.kill(os.getpid(), signal.SIGSTOP)


def tidies(folder: str) -> None:
    """Ends by SIGTERM when it has done its last work."""

    def end(*_: object) -> None:
        (Path(folder) / "tidy").write_text("yes")
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    waits(folder)


def bears(folder: str) -> None:
    """Starts a process of its own, and waits with it."""
    child = subprocess.Popen(["sleep", "1000"])
    (Path(folder) / f"{child.pid}.pid").touch()
    waits(folder)


def mark(folder: str) -> None:
    """Leave the process id behind as the name of a file."""
    (Path(folder) / f"{os.getpid()}.pid").touch()


PARTS = {each.__name__: each for each in (exits, fails, killed, says, waits, stops, tidies, bears)}


def marked(folder: Path, count: int, seconds: float = 60.0) -> list[int]:
    """The ids of `count` processes, once they have left them."""
    deadline = time.monotonic() + seconds
    while len(found := [int(path.stem) for path in folder.glob("*.pid")]) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} processes after {seconds} s"
        time.sleep(0.01)
    return found


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    """Whether all these processes have ended, in that time."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    """Whether a process has not ended yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
