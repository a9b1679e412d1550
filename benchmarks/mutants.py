"""Plants small faults in the torch-free rooms, one at a time, and counts those that tests notice.

    python benchmarks/mutants.py                    200 faults, and those that no test noticed
    python benchmarks/mutants.py --rooms cost plan --count 50 --seed 7
    python benchmarks/mutants.py --survivors FILE   the survivors of earlier results once more
    python benchmarks/mutants.py --file-list        the files, and how many faults each can have

A fault turns a comparison, an operator, a boolean, a small number, or `min` and `max`. The tests
are those of `make check`. A fault meets the tests that run its statement: first those of its own
room, the quick ones before the slow ones, until one fails. Everything happens on a copy of the
tree in a folder named by its contents; what was found is kept there, so a run that was interrupted
goes on where it was. `mutants_equivalent.toml` lists faults that change nothing, and why.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import random
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from forked import Ended, Work, all_of
from mutants_reach import Reach, reached
from mutants_run import Tree, copied, try_mutant
from mutations import Mutation, mutations, planted

HERE = Path(__file__).parent
EQUIVALENT = HERE / "mutants_equivalent.toml"
SELECTION = "not slow and not heavy"
"""The tests of `make check`."""
ROOMS = (
    "cluster", "plan", "layout", "model", "program", "cost", "simulate", "rivals", "search",
    "techniques", "export", "report", "money",
)  # fmt: skip
OUTCOMES = ("killed", "timed out", "survived", "equivalent")
TEST_SECONDS, TIMES_LONGER = 10.0, 5.0
"""CPU time that a test may take with a mutant: this multiple of its own, and some seconds."""
IMPORT_SECONDS = 60
WALL_SECONDS = 1200.0
"""For tests that wait instead of working."""
QUICK = 1.0
"""CPU seconds of a test; longer ones wait for some of the others."""
SHOWN = 60
"""Characters of an expression that are printed."""


@dataclass(frozen=True)
class Tried:
    """A mutant and what became of it."""

    key: str
    room: str
    file: str
    line: int
    function: str
    old: str
    new: str
    nth: int
    outcome: str
    by: str
    """The test that noticed it."""
    tests: int
    """How many tests run its statement."""
    seconds: float
    """Of CPU."""


def room_of(file: str) -> str:
    """Returns the folder of the package that a file is in, or the name of a file beside them."""
    return Path(file).parts[0].removesuffix(".py")


def sources(tree: Tree, rooms: Sequence[str], without: Sequence[str]) -> dict[str, str]:
    """Returns the sources of rooms by file, without those that import torch."""
    found = {}
    for path in sorted(tree.source.rglob("*.py")):
        file = path.relative_to(tree.source).as_posix()
        source = path.read_text(encoding="utf-8")
        if room_of(file) in rooms and file not in without and not _imports_torch(source):
            found[file] = source
    return found


def _imports_torch(source: str) -> bool:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return any(name.partition(".")[0] == "torch" for name in names)


def sample(texts: dict[str, str], count: int, seed: int) -> list[tuple[Mutation, int]]:
    """Returns mutations, and the place of each in its file: a room has its share of the lines."""
    chance = random.Random(seed)
    lines = Counter[str]()
    for file, text in texts.items():
        lines[room_of(file)] += len(text.splitlines())
    found = []
    for room in sorted(lines):
        number = round(count * lines[room] / lines.total())
        all_here = [
            (each, i)
            for file, text in texts.items()
            if room_of(file) == room
            for i, each in enumerate(mutations(text, file))
        ]
        found += chance.sample(all_here, min(number, len(all_here)))
    # A run that ends early has then seen something of every room.
    chance.shuffle(found)
    return found


def those_of(path: Path, texts: dict[str, str]) -> list[tuple[Mutation, int]]:
    """Returns the survivors of an earlier run, found again by what they are and not by the line."""
    keys = {each.key for each in _results(path).values() if each.outcome == "survived"}
    return [
        (each, i)
        for file, text in texts.items()
        for i, each in enumerate(mutations(text, file))
        if each.key in keys
    ]


def tests_for(mutation: Mutation, reach: Reach, texts: dict[str, str], most: float) -> list[str]:
    """Returns the tests that can notice a mutation, the likeliest first, within `most` CPU seconds.

    What is run at import has no mark: the tests of its room can notice it, and those that run a
    statement which mentions what it binds.
    """
    names, room = list(reach.seconds), room_of(mutation.file)
    place = f"{mutation.file}:{mutation.statement}"
    wanted = set(reach.runs.get(place, ()))
    if not mutation.statement or place in reach.imported:
        wanted |= {i for i, name in enumerate(names) if name.startswith(f"tests/{room}/")}
        for file, text in texts.items():
            for line in _mentions(text, mutation.names):
                wanted.update(reach.runs.get(f"{file}:{line}", ()))
    files = Counter[str]()
    for i in wanted:
        files[names[i].partition("::")[0]] += reach.seconds[names[i]]
    turns = _turns([names[i] for i in wanted])

    def likelihood(i: int) -> tuple[int, bool, float, str, float]:
        file, seconds = names[i].partition("::")[0], reach.seconds[names[i]]
        elsewhere = not file.startswith(f"tests/{room}/")
        return turns[names[i]] + 3 * (seconds > QUICK), elsewhere, files[file], file, seconds

    chosen = [names[i] for i in sorted(wanted, key=likelihood) if names[i] not in reach.failed]
    spent = accumulate(reach.seconds[name] for name in chosen)
    return [name for name, seconds in zip(chosen, spent, strict=True) if seconds <= most]


def _turns(names: Iterable[str]) -> dict[str, int]:
    """Returns when each test has its turn: of the cases of one test, any two first, then two more,
    then four, as cases are like each other."""
    cases: dict[str, list[str]] = {}
    for name in names:
        cases.setdefault(name.partition("[")[0], []).append(name)
    chance = random.Random(0)
    found = {}
    for those in cases.values():
        mixed = chance.sample(sorted(those), len(those))
        found.update({name: (i // 2).bit_length() for i, name in enumerate(mixed)})
    return found


def _mentions(text: str, names: Sequence[str]) -> Iterator[int]:
    """The first lines of the statements that mention a name."""
    if not any(name in text for name in names):
        return
    for statement in ast.walk(ast.parse(text)):
        if isinstance(statement, ast.stmt):
            for node in ast.walk(statement):
                if getattr(node, "id", None) in names or getattr(node, "attr", None) in names:
                    yield statement.lineno


def tried(
    tree: Tree,
    texts: dict[str, str],
    chosen: Sequence[tuple[Mutation, int]],
    jobs: int,
    equivalent: dict[str, str],
    most: float,
) -> Iterator[Tried]:
    """Tries mutants that were not tried before on this tree, and yields what became of all."""
    log = tree.root.with_suffix(".results.jsonl")
    known = _results(log) if log.exists() else {}
    reach = reached(tree, sorted(texts))
    todo: dict[int, Mutation] = {}
    works = []
    for mutation, place in chosen:
        names = tests_for(mutation, reach, texts, most)
        if mutation.key in equivalent:
            yield _tried(mutation, "equivalent", equivalent[mutation.key], len(names), 0.0)
        elif mutation.key in known:
            yield known[mutation.key]
        elif not names:
            yield _tried(mutation, "survived", "no test runs it", 0, 0.0)
        else:
            code, limits = planted(texts[mutation.file], place), _limits(names, reach)
            works.append(_work(tree, mutation, code, limits, len(works)))
            todo[id(works[-1])] = mutation
    _warm(reach)
    with log.open("a", encoding="utf-8") as out:
        for ended in all_of(works, jobs):
            mutation = todo[id(ended.work)]
            tests = len(tests_for(mutation, reach, texts, most))
            found = _tried(mutation, *_outcome(ended), tests, ended.cpu_seconds)
            out.write(json.dumps(asdict(found)) + "\n")
            out.flush()
            yield found


def _limits(names: Iterable[str], reach: Reach) -> dict[str, float]:
    """Returns the CPU time that each test may take."""
    return {name: TEST_SECONDS + TIMES_LONGER * reach.seconds[name] for name in names}


def _work(
    tree: Tree, mutation: Mutation, code: ast.Module, limits: dict[str, float], number: int
) -> Work:
    """What a process does with a mutant; its limit is that of all its tests, and an import."""
    run = partial(try_mutant, tree, mutation.file, code, limits)
    most = IMPORT_SECONDS + int(sum(limits.values()))
    return Work(run, tree.root.with_suffix(f".{number}.log"), most, WALL_SECONDS)


def _warm(reach: Reach) -> None:
    """Imports what the tests import from elsewhere, once for all processes forked from this one."""
    for name in reach.failed:
        print(f"fails on the tree as it is: {name}")
    for name in reach.modules:
        # Some modules can only be imported by others of theirs.
        with suppress(Exception):
            importlib.import_module(name)


def _outcome(ended: Ended) -> tuple[str, str]:
    if ended.late:
        return "timed out", ""
    if ended.result is None:
        return "killed", f"the process ended with status {ended.status}"
    if ended.result["status"] == "0":
        return "survived", ""
    return "killed", ended.result.get("by", "while tests were collected")


def _tried(mutation: Mutation, outcome: str, by: str, tests: int, seconds: float) -> Tried:
    return Tried(
        key=mutation.key,
        room=room_of(mutation.file),
        file=mutation.file,
        line=mutation.line,
        function=mutation.function,
        old=mutation.old,
        new=mutation.new,
        nth=mutation.nth,
        outcome=outcome,
        by=by,
        tests=tests,
        seconds=round(seconds, 2),
    )


def _results(path: Path) -> dict[str, Tried]:
    lines = path.read_text(encoding="utf-8").splitlines()
    # The last line of a run that was killed may be cut off.
    found = [Tried(**json.loads(line)) for line in lines if line.endswith("}")]
    return {each.key: each for each in found}


def known_equivalent(path: Path, texts: dict[str, str]) -> dict[str, str]:
    """Returns why some mutations change nothing; names those whose source is there no more."""
    if not path.exists():
        return {}
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["equivalent"]
    found = {}
    for entry in entries:
        place = (entry["file"], entry["function"], entry["old"], entry["new"])
        found["|".join([*place, str(entry.get("nth", 0))])] = entry["why"]
    there = {each.key for file, text in texts.items() for each in mutations(text, file)}
    for key in found:
        if key.partition("|")[0] in texts and key not in there:
            print(f"{path.name}: no such mutation any more: {key}")
    return found


def _around(old: str, new: str) -> str:
    """Both texts, and of long ones what differs with a little around it."""
    same = next((i for i, pair in enumerate(zip(old, new, strict=False)) if len({*pair}) > 1), 0)
    first = max(0, same - SHOWN // 2) if max(len(old), len(new)) > SHOWN else 0
    return f"{old[first : first + SHOWN]} -> {new[first : first + SHOWN]}"


def table(results: Sequence[Tried]) -> Iterator[str]:
    """Yields a line for each room: how many mutants there were, and what became of them."""
    yield (
        f"{'room':<12}{'mutants':>9}" + "".join(f"{each:>12}" for each in OUTCOMES) + f"{'rate':>8}"
    )
    for room in [*sorted({each.room for each in results}), "all"]:
        here = [each for each in results if room in (each.room, "all")]
        counts = Counter(each.outcome for each in here)
        noticed = counts["killed"] + counts["timed out"]
        of = len(here) - counts["equivalent"]
        rate = f"{noticed / of:8.1%}" if of else ""
        yield (
            f"{room:<12}{len(here):>9}" + "".join(f"{counts[each]:>12}" for each in OUTCOMES) + rate
        )


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", nargs="+", default=ROOMS)
    parser.add_argument(
        "--without", nargs="+", default=(), help="files of the package to leave as they are"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--survivors", type=Path, help="try those that survived in these results")
    parser.add_argument("--seconds", type=float, default=90.0, help="of CPU for a mutant's tests")
    parser.add_argument("--file-list", action="store_true", help="print the files and try nothing")
    parser.add_argument("--tree", type=Path, default=HERE.parent, help="what holds src and tests")
    parser.add_argument("--package", default="meshwright")
    parser.add_argument("--selection", default=SELECTION, help="markers of the tests to run")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mutants")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries the mutants that are asked for, and prints what became of them."""
    asked = _arguments(arguments)
    asked.work.mkdir(parents=True, exist_ok=True)
    tree = Tree(copied(asked.tree.resolve(), asked.work.resolve()), asked.package, asked.selection)
    everything = sources(tree, ROOMS if set(asked.rooms) <= set(ROOMS) else asked.rooms, ())
    texts = sources(tree, asked.rooms, asked.without)
    if asked.file_list:
        for file, text in texts.items():
            print(f"{len(mutations(text, file)):>6} {file}")
        return 0
    if asked.survivors:
        chosen = those_of(asked.survivors, texts)
    else:
        chosen = sample(texts, asked.count, asked.seed)
    results = []
    equivalent = known_equivalent(EQUIVALENT, texts)
    for each in tried(tree, everything, chosen, asked.jobs, equivalent, asked.seconds):
        results.append(each)
        if each.outcome == "survived":
            told = f"{each.file}:{each.line}: {_around(each.old, each.new)}"
            print(f"{told}  ({each.tests} tests run it)", flush=True)
    print()
    print("\n".join(table(results)))
    print(f"{sum(each.seconds for each in results):.0f} CPU seconds; {tree.root}.results.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
