"""Finds out which tests run which statements, by a mark that every statement sets.

What is known of a file of tests stays known until that file, the sources, or what all tests share
changes: after an edit of one file, its tests alone are run again.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from forked import Work, all_of
from mutants_run import Tree, run_tests

PROBE = "__ran__"


@dataclass(frozen=True)
class Reach:
    """What the tests do without a mutant."""

    seconds: dict[str, float]
    """The CPU time of every test, with the set-up it needed."""
    runs: dict[str, list[int]]
    """`file:line` of a statement -> the tests that run it, as places in `seconds`."""
    imported: list[str]
    """Statements that are run when a file is imported."""
    modules: list[str]
    """All that was imported from elsewhere."""
    failed: list[str]
    """Tests that fail on the tree as it is; they can notice nothing."""


class _Marks:
    """A plugin of pytest that writes down which statements every test runs."""

    def __init__(self, places: list[str], ran: bytearray) -> None:
        self.places, self.ran = places, ran
        self.seconds: dict[str, float] = {}
        self.runs: dict[str, dict[str, None]] = {}
        self.of_files: dict[str, set[str]] = {}
        self.failed: list[str] = []
        self.imported: list[str] = []
        self.before = 0.0

    def pytest_collection_finish(self) -> None:
        """What is run by imports is run whatever tests are chosen."""
        self.imported = list(self._taken())
        self.before = time.process_time()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A set-up or an end may be of several tests: it counts for all of the file."""
        now = time.process_time()
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + now - self.before
        if report.failed:
            self.failed.append(report.nodeid)
        for place in self._taken():
            if report.when == "call":
                self.runs.setdefault(place, {})[report.nodeid] = None
            else:
                self.of_files.setdefault(report.nodeid.partition("::")[0], set()).add(place)
        self.before = time.process_time()

    def _taken(self) -> Iterable[str]:
        found, at = [], self.ran.find(1)
        while at >= 0:
            found.append(self.places[at])
            self.ran[at] = 0
            at = self.ran.find(1, at + 1)
        return found

    def reach(self, home: Path) -> Reach:
        """All that was seen."""
        for name in self.seconds:
            for place in self.of_files.get(name.partition("::")[0], ()):
                self.runs.setdefault(place, {})[name] = None
        number = {name: i for i, name in enumerate(self.seconds)}
        runs = {place: [number[name] for name in names] for place, names in self.runs.items()}
        failed = sorted(set(self.failed))
        return Reach(self.seconds, runs, self.imported, _elsewhere(home), failed)


def _elsewhere(home: Path) -> list[str]:
    """Modules that are files, and none of the tree's."""
    found = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        own = getattr(getattr(module, "__spec__", None), "name", None) == name
        if file and own and not Path(file).is_relative_to(home):
            found.append(name)
    return found


def probed(source: str, place: Callable[[int], int]) -> ast.Module:
    """Returns the tree of a source in which every statement of a function first sets its mark."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in [node, *_of_its_own(node)]:
                for name in ("body", "orelse", "finalbody"):
                    block = getattr(inner, name, None)
                    if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                        setattr(
                            inner, name, _marked(block, place, name == "body" and inner is node)
                        )
    return ast.fix_missing_locations(tree)


def _of_its_own(function: ast.AST) -> Iterator[ast.AST]:
    """What is inside a function, without the functions and classes inside it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield node
            yield from _of_its_own(node)


def _marked(block: list[ast.stmt], place: Callable[[int], int], first: bool) -> list[ast.stmt]:
    made: list[ast.stmt] = []
    for i, statement in enumerate(block):
        text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not (first and i == 0 and text) and not isinstance(statement, ast.Global | ast.Nonlocal):
            mark = ast.parse(f"{PROBE}[{place(statement.lineno)}] = 1").body[0]
            made.append(ast.copy_location(mark, statement))
        made.append(statement)
    return made


def reach_of(tree: Tree, files: Sequence[str], paths: list[str], log: Path) -> Reach:
    """Runs files of tests on the tree as it is; returns what each test runs of some sources."""
    places: list[str] = []
    for file in files:
        lines = (tree.source / file).read_text(encoding="utf-8").count("\n") + 2
        places += [f"{file}:{line}" for line in range(lines)]
    ran = bytearray(len(places))
    number = {place: i for i, place in enumerate(places)}

    def maker(file: str) -> Callable[[], ast.Module]:
        def make() -> ast.Module:
            source = (tree.source / file).read_text(encoding="utf-8")
            return probed(source, lambda line: number[f"{file}:{line}"])

        return make

    def run() -> dict[str, object]:
        setattr(builtins, PROBE, ran)
        marks = _Marks(places, ran)
        run_tests(tree, paths, {file: maker(file) for file in files}, marks, ())
        return vars(marks.reach(tree.root))

    (ended,) = all_of([Work(run, log, cpu_seconds=3600)], 1)
    if not ended.result or not ended.result["seconds"]:
        raise SystemExit(f"the tests cannot be run on the tree as it is: see {log}")
    return Reach(**ended.result)


@dataclass(frozen=True)
class _Known:
    """What was found out on a tree, and what it depends on."""

    shared: str
    """Digest of the sources, and of what all tests share."""
    tests: dict[str, str]
    """Digest of every file of tests."""
    reach: Reach


def reached(tree: Tree, files: Sequence[str]) -> Reach:
    """Returns what the tests run of some sources; runs only those of which that is not known."""
    shared, tests = _digests(tree)
    known = [_read(path) for path in tree.root.parent.glob("*.reach.json")]
    known = [each for each in known if each.shared == shared]
    old = max(known, key=lambda each: len(each.tests.items() & tests.items()), default=None)
    kept = {name for name, digest in tests.items() if old and old.tests.get(name) == digest}
    found = Reach({}, {}, [], [], [])
    if old is not None:
        found = _joined(_restricted(old.reach, kept), found)
    if changed := sorted(tests.keys() - kept):
        print(f"what is run by the tests of {len(changed)} files ...", flush=True)
        fresh = reach_of(tree, files, changed, tree.root.with_suffix(".reach.log"))
        found = _joined(found, fresh)
        text = json.dumps(asdict(_Known(shared, tests, found)))
        tree.root.with_suffix(".reach.json").write_text(text, encoding="utf-8")
    return found


def _digests(tree: Tree) -> tuple[str, dict[str, str]]:
    """Of all that tests share, and of every file of tests."""
    shared = hashlib.sha256(tree.selection.encode())
    tests = {}
    folders = (tree.root / "src", tree.root / "tests")
    for path in sorted(each for folder in folders for each in folder.rglob("*.py")):
        name = path.relative_to(tree.root).as_posix()
        if path.name.startswith("test_"):
            tests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            shared.update(f"{name} {path.stat().st_size} ".encode() + path.read_bytes())
    return shared.hexdigest(), tests


def _read(path: Path) -> _Known:
    data = json.loads(path.read_text(encoding="utf-8"))
    return _Known(data["shared"], data["tests"], Reach(**data["reach"]))


def _restricted(reach: Reach, files: set[str]) -> Reach:
    """What is known of the tests in some files."""
    kept = [i for i, name in enumerate(reach.seconds) if name.partition("::")[0] in files]
    place = {i: k for k, i in enumerate(kept)}
    names = list(reach.seconds)
    seconds = {names[i]: reach.seconds[names[i]] for i in kept}
    runs = {key: [place[i] for i in those if i in place] for key, those in reach.runs.items()}
    failed = [name for name in reach.failed if name in seconds]
    return Reach(seconds, runs, reach.imported, reach.modules, failed)


def _joined(one: Reach, other: Reach) -> Reach:
    """What is known of different tests."""
    first = len(one.seconds)
    runs = {key: list(those) for key, those in one.runs.items()}
    for key, those in other.runs.items():
        runs.setdefault(key, []).extend(first + i for i in those)
    return Reach(
        seconds={**one.seconds, **other.seconds},
        runs=runs,
        imported=sorted({*one.imported, *other.imported}),
        modules=list(dict.fromkeys([*one.modules, *other.modules])),
        failed=[*one.failed, *other.failed],
    )
