"""Runs tests on a copy of the tree in which one module differs, forked from a warm process.

What no mutant changes is imported once, by the process that forks: pytest, numpy, torch. A first
run of all tests marks every statement that each of them runs; a mutant then meets only those that
run its statement. No process outlives its run: each leads a session, which is killed after it.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType

import pytest
from forked import Work, all_of

LEFT_OUT = (".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "site", "runs")
"""Names that no test reads, and that a copy of the tree goes without."""
TEST_SECONDS, TIMES_LONGER = 10.0, 5.0
"""CPU time that a test may take with a mutant: so many times its own, and some seconds."""
PROBE = "__ran__"


@dataclass(frozen=True)
class Tree:
    """A copy of the sources and their tests."""

    root: Path
    package: str
    selection: str
    """The expression of markers that chooses the tests."""

    @property
    def source(self) -> Path:
        """The folder of the package."""
        return self.root / "src" / self.package

    def module(self, file: str) -> str:
        """The name under which a file of the package is imported."""
        parts = [self.package, *Path(file).with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@dataclass(frozen=True)
class Reach:
    """What the tests do without a mutant."""

    seconds: dict[str, float]
    """The CPU time of every test, with the set-up it needed."""
    runs: dict[str, list[int]]
    """`file:line` of a statement -> the tests that run it, as places in `seconds`."""
    modules: list[str]
    """All that was imported from elsewhere."""
    failed: list[str]
    """Tests that fail on the tree as it is; they can notice nothing."""


def copied(root: Path, work: Path) -> Path:
    """Returns a copy of a tree in a folder that is named by its contents, made at most once."""
    fresh = work / f"copying-{os.getpid()}"
    shutil.copytree(root, fresh, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    digest = hashlib.sha256()
    for path in sorted(each for each in fresh.rglob("*") if each.is_file()):
        digest.update(f"{path.relative_to(fresh)} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    kept = work / digest.hexdigest()[:12]
    if kept.exists():
        shutil.rmtree(fresh)
    else:
        fresh.rename(kept)
    return kept


class _Made(SourceFileLoader):
    """Loads a module from code that was not made from its file as it is."""

    def __init__(self, name: str, path: Path, make: Callable[[], CodeType]) -> None:
        super().__init__(name, str(path))
        self.make = make

    def get_code(self, _: str) -> CodeType:
        """Part of the protocol of loaders."""
        return self.make()


class _Replacing(MetaPathFinder):
    """Finds the modules for which there is code of our own making."""

    def __init__(self, tree: Tree, made: dict[str, Callable[[], CodeType]]) -> None:
        self.files = {tree.module(file): (tree.source / file, make) for file, make in made.items()}

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        """Part of the protocol of finders."""
        if name not in self.files:
            return None
        path, make = self.files[name]
        inside = [str(path.parent)] if path.name == "__init__.py" else None
        loader = _Made(name, path, make)
        return spec_from_file_location(name, path, loader=loader, submodule_search_locations=inside)


class _Choice:
    """A plugin of pytest that runs chosen tests in a given order, each with a limit of CPU time."""

    def __init__(self, limits: dict[str, float]) -> None:
        self.limits = limits
        self.said: dict[str, str] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leaves out what was not chosen."""
        place = {name: i for i, name in enumerate(self.limits)}
        items[:] = [item for item in items if item.nodeid in place]
        items.sort(key=lambda item: place[item.nodeid])

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Ends the process with SIGPROF if a test takes too long."""
        signal.setitimer(signal.ITIMER_PROF, self.limits[item.nodeid])
        yield
        signal.setitimer(signal.ITIMER_PROF, 0.0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remembers the first failure."""
        if report.failed:
            self.said.setdefault("by", report.nodeid)


class _Marks:
    """A plugin of pytest that writes down which statements every test runs."""

    def __init__(self, places: list[str], ran: bytearray) -> None:
        self.places, self.ran = places, ran
        self.seconds: dict[str, float] = {}
        self.runs: dict[str, dict[str, None]] = {}
        self.of_files: dict[str, set[str]] = {}
        self.failed: list[str] = []
        self.before = 0.0

    def pytest_collection_finish(self) -> None:
        """What was run to import is run again by whatever tests are chosen."""
        self._taken()
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
        return Reach(self.seconds, runs, _elsewhere(home), sorted(set(self.failed)))


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


def reach_of(tree: Tree, files: Sequence[str], log: Path) -> Reach:
    """Runs all tests on the tree as it is, and returns what each of them runs of some files."""
    places: list[str] = []
    for file in files:
        lines = (tree.source / file).read_text(encoding="utf-8").count("\n") + 2
        places += [f"{file}:{line}" for line in range(lines)]
    ran = bytearray(len(places))
    number = {place: i for i, place in enumerate(places)}

    def maker(file: str) -> Callable[[], CodeType]:
        def make() -> CodeType:
            path = tree.source / file
            source = path.read_text(encoding="utf-8")
            marked = probed(source, lambda line: number[f"{file}:{line}"])
            return compile(marked, str(path), "exec", dont_inherit=True)

        return make

    def run() -> dict[str, object]:
        setattr(builtins, PROBE, ran)
        marks = _Marks(places, ran)
        _tests(tree, [], {file: maker(file) for file in files}, marks, ())
        return vars(marks.reach(tree.root))

    (ended,) = all_of([Work(run, log, cpu_seconds=3600)], 1)
    if not ended.result or not ended.result["seconds"]:
        raise SystemExit(f"the tests cannot be run on the tree as it is: see {log}")
    return Reach(**ended.result)


def try_mutant(tree: Tree, file: str, code: ast.Module, limits: dict[str, float]) -> dict[str, str]:
    """Runs tests in this process with one file replaced; returns how that ended, and by which."""
    choice = _Choice(limits)
    paths = list(dict.fromkeys(name.partition("::")[0] for name in limits))

    def make() -> CodeType:
        return compile(code, str(tree.source / file), "exec", dont_inherit=True)

    status = _tests(tree, paths, {file: make}, choice, ("-x",))
    return {**choice.said, "status": str(int(status))}


def limits_of(names: Iterable[str], reach: Reach) -> dict[str, float]:
    """Returns the CPU time that each test may take."""
    return {name: TEST_SECONDS + TIMES_LONGER * reach.seconds[name] for name in names}


def _tests(
    tree: Tree,
    paths: list[str],
    made: dict[str, Callable[[], CodeType]],
    plugin: object,
    more: Sequence[str],
) -> int:
    os.chdir(tree.root)
    sys.path.insert(0, str(tree.root / "src"))
    sys.meta_path.insert(0, _Replacing(tree, made))
    base = tree.root.parent / f"basetemp-{os.getpid()}"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(base)]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-m", tree.selection, *more]
    try:
        return pytest.main([*options, *paths], plugins=[plugin, _NoShrinking()])
    finally:
        shutil.rmtree(base, ignore_errors=True)


class _NoShrinking:
    """A plugin of pytest: hypothesis makes no failing example smaller, as nobody reads it."""

    def pytest_collection(self) -> None:
        """Changes the profile that the tests have chosen, before they are imported."""
        from hypothesis import Phase, settings

        phases = (Phase.explicit, Phase.generate)
        chosen = settings.get_profile(settings.get_current_profile_name())
        settings.register_profile("mutants", chosen, phases=phases)
        settings.load_profile("mutants")
