"""Spoils files and options of every kind in every way, and looks how meshwright takes it.

    python benchmarks/fuzz.py                     the whole: every stratum several times
    python benchmarks/fuzz.py --seed 7 --tenth    a tenth of the strata, as CI does
    python benchmarks/fuzz.py --seed 7 --only 123 one case again, with all that it says

A case spoils one file (or option) and runs a verb on it, in a process forked from this one with a
folder of its own. It has failed if it ends in a traceback or by a signal, takes more than 20 s or
1 GiB, leaves processes or files elsewhere, takes what it must refuse, refuses what is ordinary,
does not name what is wrong, or prints what steers a terminal. Strata are every kind of file with
every class of mutation, and every option with every class of its sort; each case depends on seed
and number alone.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fuzz_cases import Case, case_of, runs, strata
from fuzz_world import make_world

from meshwright.text import forbidden_character

BYTES = 2**30
"""What a case may take."""
END_SECONDS = 5.0
"""In which processes that were killed must be gone."""
CRASHED = 70
"""Exit status of a verb that raised what was not foreseen."""
MARK = "MESHWRIGHT_FUZZ_CASE"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
NONSENSE = re.compile(r"(?<![A-Za-z./_-])(nan|inf)(?![A-Za-z./_-])")


@dataclass
class Ended:
    """What became of a case."""

    case: Case
    status: int
    seconds: float
    grown: int
    """Bytes of memory beyond what the warm process had."""
    out: str
    err: str
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Warm:
    """What every case starts from."""

    world: Path
    work: Path


def play(case: Case, home: Path) -> None:
    """The life of a case, in a process of its own. Does not return."""
    status = CRASHED
    try:
        os.setsid()
        os.chdir(home)
        os.environ[MARK] = str(case.index)
        os.environ["TMPDIR"] = str(home.parent / "tmp")
        tempfile.tempdir = None
        for number, name in ((1, "out"), (2, "err")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(home.parent / f"{name}.txt", flags), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = _verb(case.arguments)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _verb(arguments: Sequence[str]) -> int:
    from meshwright import cli

    if arguments[0].startswith("@"):
        cli.app = lambda: _reader(arguments[0], Path(arguments[1]))  # type: ignore[assignment]
    sys.argv = ["meshwright", *arguments]
    cli.main()
    return 0


def _reader(what: str, path: Path) -> None:
    """Files that only runs read, which would take long."""
    from rich.console import Console

    from meshwright.cluster.files import load_cluster
    from meshwright.cost.links import load_links
    from meshwright.errors import ProfileError
    from meshwright.program.timeline import Timeline
    from meshwright.records import load
    from meshwright.report.chrome_trace import save_chrome_trace
    from meshwright.report.verification import fitted_links_table

    if what == "@links":
        Console().print(fitted_links_table(load_links(path, load_cluster(Path("cluster.toml")))))
    else:
        save_chrome_trace(load(path, Timeline, error=ProfileError), Path("out.json"))
    raise SystemExit(0)


def prepare(case: Case, warm: Warm) -> Path:
    """A folder with a world of its own, spoiled; that in which the verb runs."""
    home = warm.work / f"case-{case.index}" / "deep" / "home"
    shutil.copytree(warm.world, home)
    (home.parent / "tmp").mkdir()
    os.mkfifo(home / "pipe")
    (home / "loop").symlink_to("loop")
    if case.spoil is not None:
        case.spoil.make(home / case.path)
    return home


def resident_bytes() -> int:
    """Memory of this process now, which a forked one begins with."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def run(cases: Iterator[Case], warm: Warm, at_once: int) -> Iterator[Ended]:
    """Play all of them, some at a time."""
    going: dict[int, tuple[int, Case, Path, float, int]] = {}
    ahead = next(cases, None)
    while ahead or going:
        while ahead and len(going) < at_once:
            home, resident = prepare(ahead, warm), resident_bytes()
            pid = os.fork()
            if not pid:
                play(ahead, home)
            going[os.pidfd_open(pid)] = (pid, ahead, home, time.monotonic(), resident)
            ahead = next(cases, None)
        poll = select.poll()
        for handle in going:
            poll.register(handle, select.POLLIN)
        poll.poll(200)
        for handle, (pid, case, home, began, resident) in list(going.items()):
            late = time.monotonic() - began > case.seconds
            if late:
                _end_marked(case.index, pid)
            done, status, used = os.wait4(pid, 0 if late else os.WNOHANG)
            if done:
                del going[handle]
                os.close(handle)
                grown = used.ru_maxrss * 1024 - resident
                yield _judged(case, home, status, time.monotonic() - began, grown)
                shutil.rmtree(home.parents[1], ignore_errors=True)


def _end_marked(index: int, pid: int) -> list[int]:
    """End every process of a case; those that were not its first."""
    left = [p for p in _marked(index) if p != pid]
    for each in (*left, *([pid] if pid else [])):
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    return left


def _marked(index: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            with suppress(OSError):
                if f"{MARK}={index}\0".encode() in (folder / "environ").read_bytes() + b"\0":
                    found.append(int(folder.name))
    return found


def _judged(case: Case, home: Path, status: int, seconds: float, grown: int) -> Ended:
    """What became of a case whose first process has ended, and all that is wrong with it."""
    code = os.waitstatus_to_exitcode(status)
    out, err = (
        (home.parent / f"{name}.txt").read_bytes().decode("utf-8", "replace")
        for name in ("out", "err")
    )
    told = COLOURS.sub("", out)
    late = seconds > case.seconds
    wrong = {
        "traceback": code == CRASHED or "Traceback (most recent" in out + err,
        "hang": late,
        f"ended by {code}": not late and code not in (0, 1, 2, CRASHED),
        "memory": grown > BYTES or "no memory left" in err,
        "nonsense accepted": case.verdict == "refused" and code == 0,
        "ordinary refused": case.verdict == "accepted" and code != 0,
        "nothing named": code == 2 and not any(word and word in err for word in case.named),
        "steers the terminal": forbidden_character(
            (told + COLOURS.sub("", err)).replace("\ufffd", ""), lines=True
        ),
        "printed no number": code == 0 and NONSENSE.search(told),
        "process left": _left(case.index),
        "stray files": _strays(home),
    }
    failures = [word for word, found in wrong.items() if found]
    return Ended(case, code, seconds, grown, out, err, failures)


def _left(index: int) -> bool:
    """Whether processes of a case are there that should have ended; they are ended."""
    until = time.monotonic() + END_SECONDS
    while _marked(index):
        if time.monotonic() > until:
            _end_marked(index, 0)
            return True
        time.sleep(0.05)
    return False


def _strays(home: Path) -> list[str]:
    """What lies outside the folder of a case, and drafts that were not taken away."""
    expected = {home, home.parent / "tmp", home.parent / "out.txt", home.parent / "err.txt"}
    outside = [p for p in (*home.parent.iterdir(), *home.parents[1].iterdir()) if p not in expected]
    drafts = [] if home.is_symlink() else list(home.rglob(".*.draft"))
    return [str(p.name) for p in (*outside, *drafts) if p != home.parent]


def table(results: Sequence[Ended]) -> str:
    """Counts by kind and class, failures after a stroke."""
    kinds = sorted({each.case.kind for each in results})
    lines = []
    for kind in kinds:
        own = [each for each in results if each.case.kind == kind]
        sorts = Counter(each.case.sort for each in own)
        bad = Counter(each.case.sort for each in own if each.failures)
        cells = (f"{sort} {n}" + (f"/{bad[sort]}!" if bad[sort] else "") for sort, n in
                 sorted(sorts.items()))  # fmt: skip
        refused = sum(each.status == 2 for each in own)
        lines.append(f"{kind}: {len(own)} cases, {refused} refused, {sum(bad.values())} failed")
        lines.append(f"    {', '.join(cells)}")
    return "\n".join(lines)


def _tell(ended: Ended, seed: int) -> None:
    case = ended.case
    words = " ".join(each if len(each) < 80 else f"{each[:60]}..." for each in case.arguments)
    print(f"FAILED {', '.join(ended.failures)}: {case.kind}, {case.sort}: {case.change[:200]!r}")
    print(f"    meshwright {words!r}: status {ended.status}, {ended.seconds:.1f} s, "
          f"{ended.grown / 2**20:.0f} MiB")  # fmt: skip
    print(f"    python benchmarks/fuzz.py --seed {seed} --only {case.index}")
    for line in (ended.err or ended.out).strip().splitlines()[-3:]:
        print(f"    | {line[:300]!r}")


def chosen(options: argparse.Namespace, warm: Warm) -> Iterator[Case]:
    """The cases that were asked for."""
    size = len(strata())
    if options.only is not None and options.only < 0:
        yield from (case for case in runs() if case.index == options.only)
        return
    numbers = range(options.count or 2 * size)
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
    elif options.tenth:
        numbers = range(options.seed % 10, size, 10)
    yield from (case_of(number, options.seed, warm.world) for number in numbers)
    yield from runs() if options.only is None and not options.tenth else ()


def main() -> int:
    """Play, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="cases; default: every stratum twice")
    parser.add_argument("--tenth", action="store_true", help="every tenth stratum, no real runs")
    parser.add_argument("--only", type=int, help="the number of one case")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="meshwright-fuzz-") as scratch:
        warm = warmed(Path(scratch))
        results = []
        for ended in run(chosen(options, warm), warm, options.at_once):
            results.append(ended)
            if ended.failures:
                _tell(ended, options.seed)
            if options.only is not None:
                print(ended.out, ended.err, sep="\n")
    failed = [each for each in results if each.failures]
    print(table(results))
    kinds = Counter(word.partition(" ")[0] for each in failed for word in each.failures)
    print(f"{len(results)} cases in {time.monotonic() - began:.0f} s, {len(failed)} failed: "
          f"{dict(kinds)}; slowest {max(r.seconds for r in results):.1f} s, largest "
          f"{max(r.grown for r in results) / 2**20:.0f} MiB")  # fmt: skip
    return 1 if failed else 0


def warmed(scratch: Path) -> Warm:
    """Import what verbs need, once, and write the world."""
    import torch  # noqa: F401

    world, work = scratch / "world", scratch / "work"
    world.mkdir()
    work.mkdir()
    here = Path.cwd()
    os.chdir(world)
    make_world(world)
    os.chdir(here)
    return Warm(world, work)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
