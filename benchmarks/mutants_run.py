"""Runs tests on a copy of the tree in which one module differs, forked from a warm process.

What no mutant changes is imported once, by the process that forks: pytest, numpy, torch. A first
run of all tests marks every statement that each of them runs; a mutant then meets only those that
run its statement. No process outlives its run: each leads a session, which is killed after it.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType

import pytest

LEFT_OUT = (".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "site", "runs")
"""Names that no test reads, and that a copy of the tree goes without."""


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
    """Loads a module from a syntax tree that was not made from its file as it is."""

    def __init__(self, name: str, path: Path, make: Callable[[], ast.Module]) -> None:
        super().__init__(name, str(path))
        self.make = make

    def get_code(self, _: str) -> CodeType:
        """Part of the protocol of loaders."""
        return self.source_to_code(self.make(), self.path)  # type: ignore[arg-type]


class _Replacing(MetaPathFinder):
    """Finds the modules for which there is a tree of our own making."""

    def __init__(self, tree: Tree, made: dict[str, Callable[[], ast.Module]]) -> None:
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


def try_mutant(tree: Tree, file: str, code: ast.Module, limits: dict[str, float]) -> dict[str, str]:
    """Runs tests in this process with one file replaced; returns how that ended, and by which."""
    choice = _Choice(limits)
    paths = list(dict.fromkeys(name.partition("::")[0] for name in limits))
    status = run_tests(tree, paths, {file: lambda: code}, choice, ("-x",))
    return {**choice.said, "status": str(int(status))}


def run_tests(
    tree: Tree,
    paths: list[str],
    made: dict[str, Callable[[], ast.Module]],
    plugin: object,
    more: Sequence[str],
) -> int:
    os.chdir(tree.root)
    sys.path.insert(0, str(tree.root / "src"))
    sys.meta_path.insert(0, _Replacing(tree, made))
    base = tree.root.parent / f"basetemp-{os.getpid()}"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(base)]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-m", tree.selection]
    # How a test fails is not read, and to describe large values can take longer than the test.
    options += ["--tb=no", "--assert=plain", *more]
    try:
        return pytest.main([*options, *paths], plugins=[plugin, _NoShrinking()])
    finally:
        shutil.rmtree(base, ignore_errors=True)


class _NoShrinking:
    """A plugin of pytest: hypothesis makes no failing example smaller, as it is not read."""

    def pytest_collection(self) -> None:
        """Changes the profile that the tests have chosen, before they are imported."""
        from hypothesis import Phase, settings

        phases = (Phase.explicit, Phase.generate)
        chosen = settings.get_profile(settings.get_current_profile_name())
        settings.register_profile("mutants", chosen, phases=phases)
        settings.load_profile("mutants")
